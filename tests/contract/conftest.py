"""The adapters of every port: each contract test runs with the adapter in memory and with the real one."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from contract.adapters import MemoryWorld, RabbitWorld, World
from sublet_platform.memory import (
    MemoryDatabase,
    MemoryEventStore,
    MemoryRunStore,
    MemorySettingsStore,
    MemoryTimerStore,
)
from sublet_platform.mongo.events import MongoEventStore
from sublet_platform.mongo.runs import MongoRunStore
from sublet_platform.mongo.settings import MongoSettingsStore
from sublet_platform.mongo.timers import MongoTimerStore
from sublet_platform.ports import EventStore, RunStore, SettingsStore, TimerStore
from support.clocks import ManualClock
from support.databases import fresh_database
from support.servers import Servers


@pytest.fixture(params=["memory", pytest.param("real", marks=pytest.mark.real)])
def adapter(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
async def world(adapter: str, request: pytest.FixtureRequest) -> AsyncIterator[World]:
    if adapter == "memory":
        world: World = MemoryWorld()
    else:
        servers: Servers = request.getfixturevalue("servers")
        world = RabbitWorld(servers.amqp_url)
    yield world
    await world.stop()


@pytest.fixture
async def run_store(adapter: str, clock: ManualClock, request: pytest.FixtureRequest) -> AsyncIterator[RunStore]:
    if adapter == "memory":
        yield MemoryRunStore(MemoryDatabase(), clock)
        return
    servers: Servers = request.getfixturevalue("servers")
    async with fresh_database(servers.mongo_url) as database:
        store = MongoRunStore(database, clock)
        await store.ensure_indexes()
        yield store


@pytest.fixture
async def settings_store(adapter: str, request: pytest.FixtureRequest) -> AsyncIterator[SettingsStore]:
    if adapter == "memory":
        yield MemorySettingsStore(MemoryDatabase())
        return
    servers: Servers = request.getfixturevalue("servers")
    async with fresh_database(servers.mongo_url) as database:
        yield MongoSettingsStore(database)


@pytest.fixture
async def timer_store(adapter: str, request: pytest.FixtureRequest) -> AsyncIterator[TimerStore]:
    if adapter == "memory":
        yield MemoryTimerStore(MemoryDatabase())
        return
    servers: Servers = request.getfixturevalue("servers")
    async with fresh_database(servers.mongo_url) as database:
        store = MongoTimerStore(database)
        await store.ensure_indexes()
        yield store


@pytest.fixture
async def event_store(adapter: str, request: pytest.FixtureRequest) -> AsyncIterator[EventStore]:
    if adapter == "memory":
        yield MemoryEventStore(MemoryDatabase())
        return
    servers: Servers = request.getfixturevalue("servers")
    async with fresh_database(servers.mongo_url) as database:
        store = MongoEventStore(database)
        await store.ensure_indexes()
        yield store
