"""Fixtures for tests that need a RabbitMQ and a MongoDB.

Drivers are imported where they are needed, so that a unit test does not pay for them.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator
from typing import TYPE_CHECKING, NoReturn

import pytest

from support.servers import LocalError, MongoServer, RabbitServer, Servers, ServersUnavailable, find_servers

if TYPE_CHECKING:
    from sublet_platform.mongo.client import Mongo


def without_servers(reason: str) -> NoReturn:
    """Skip the test without servers, or fail it where servers are required."""
    if os.environ.get("SUBLET_REQUIRE_SERVERS") == "1":
        pytest.fail(f"SUBLET_REQUIRE_SERVERS=1, but {reason}")
    pytest.skip(reason)


@pytest.fixture(scope="session")
def servers() -> Iterator[Servers]:
    """A RabbitMQ and a MongoDB, shared by all tests."""
    search = find_servers()
    try:
        found = search.__enter__()
    except ServersUnavailable as error:
        without_servers(str(error))
    try:
        yield found
    finally:
        search.__exit__(None, None, None)


@pytest.fixture(scope="module")
def own_rabbit(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RabbitServer]:
    """A private RabbitMQ, which the test may stop and kill."""
    server = RabbitServer(tmp_path_factory.mktemp("rabbit"))
    try:
        server.start()
    except LocalError as error:
        without_servers(str(error))
    try:
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="module")
def own_mongo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MongoServer]:
    """A private MongoDB, which the test may stop and kill."""
    server = MongoServer(tmp_path_factory.mktemp("mongo"))
    try:
        server.start()
    except LocalError as error:
        without_servers(str(error))
    try:
        yield server
    finally:
        server.stop()


@pytest.fixture
async def mongo(servers: Servers) -> AsyncIterator[Mongo]:
    """A database of its own for each test."""
    from support.databases import fresh_database

    async with fresh_database(servers.mongo_url) as database:
        yield database
