"""The stores while MongoDB is unavailable, and with documents that it rejects."""

from __future__ import annotations

import asyncio
import subprocess
import sys

import msgspec
import pytest

from contract.records import a_run
from sublet_engine.run.state import TaskRun
from sublet_platform.mongo.client import Mongo, connect
from sublet_platform.mongo.events import MongoEventStore
from sublet_platform.mongo.replica_set import ensure_replica_set, members_of
from sublet_platform.mongo.runs import MongoRunStore
from sublet_platform.mongo.timers import MongoTimerStore
from sublet_platform.ports import RunChange, StoredTimer, StoreUnavailable
from support.clocks import ManualClock
from support.databases import fresh_database
from support.servers import MongoServer, Servers

pytestmark = pytest.mark.real


async def test_every_store_is_unavailable_while_the_server_is_stopped(own_mongo: MongoServer) -> None:
    async with fresh_database(own_mongo.url) as mongo:
        runs, timers, events = MongoRunStore(mongo, ManualClock()), MongoTimerStore(mongo), MongoEventStore(mongo)
        run = a_run()
        await runs.commit([RunChange(None, run)])
        await asyncio.to_thread(own_mongo.kill)
        for attempt in (
            runs.load_runs([run.id]),
            runs.commit([RunChange(None, a_run("new"))]),
            timers.change_timers([StoredTimer("t", 1.0, "r.t", "1", "s")], []),
            events.last_seq(),
        ):
            with pytest.raises(StoreUnavailable):
                await attempt
        await asyncio.to_thread(own_mongo.start)
        assert await runs.load_runs([run.id, "new"]) == [run]


async def test_a_confirmed_commit_survives_the_kill_of_the_server(own_mongo: MongoServer) -> None:
    async with fresh_database(own_mongo.url) as mongo:
        store = MongoRunStore(mongo, ManualClock())
        runs = [a_run(f"run-{number}") for number in range(100)]
        await store.commit([RunChange(None, run) for run in runs])
        await asyncio.to_thread(own_mongo.kill)
        await asyncio.to_thread(own_mongo.start)
        found = await store.load_runs([run.id for run in runs])
        assert len(found) == len(runs)


async def test_a_document_that_is_too_large_is_an_error_and_not_an_outage(mongo: Mongo) -> None:
    store = MongoRunStore(mongo, ManualClock())
    before = a_run(tasks=tuple(TaskRun(f"t{number}", output="x" * 1_000_000) for number in range(15)))
    await store.commit([RunChange(None, before)])
    grown = msgspec.structs.replace(before, input="x" * 4_000_000, revision=2)
    with pytest.raises(Exception, match=r"(?i)large|size") as caught:
        await store.commit([RunChange(before, grown)])
    assert not isinstance(caught.value, StoreUnavailable)
    assert await store.load_runs([before.id]) == [before]


async def test_an_invalid_address_is_an_error_at_once() -> None:
    with pytest.raises(ValueError, match="MongoDB URL"):
        connect("http://example.org", "sublet")


async def test_round_trips_are_measured(servers: Servers) -> None:
    seen: list[tuple[str, float]] = []
    mongo = connect(servers.mongo_url, "sublet_test", on_seconds=lambda operation, s: seen.append((operation, s)))
    await mongo.ping()
    mongo.close()
    [(operation, seconds)] = seen
    assert operation == "ping"
    assert seconds > 0


async def test_initiating_a_replica_set_again_changes_nothing(own_mongo: MongoServer) -> None:
    await ensure_replica_set(own_mongo.url)
    command = [sys.executable, "-m", "sublet_platform.mongo.replica_set", own_mongo.url]
    done = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, check=True)
    assert "primary" in done.stdout


@pytest.mark.parametrize(
    ("url", "members"),
    [
        ("mongodb://127.0.0.1:27018/?directConnection=true", ["127.0.0.1:27018"]),
        ("mongodb://user:p%40ss@db.example/", ["db.example:27017"]),
        ("mongodb://a:1,b:2/?replicaSet=rs0", ["a:1", "b:2"]),
        ("mongodb://user:secret@a,b:2,c/sublet?replicaSet=rs0", ["a:27017", "b:2", "c:27017"]),
    ],
)
def test_the_members_of_a_replica_set_are_the_hosts_of_its_url(url: str, members: list[str]) -> None:
    assert members_of(url) == members
