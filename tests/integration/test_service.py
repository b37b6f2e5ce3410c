"""A service as a process: it starts before its servers, reports what is missing, and stops gracefully."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
import urllib.error
import urllib.request
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from sublet_platform.mongo.client import connect
from sublet_platform.rabbit.broker import declare, declare_topology
from sublet_protocol.topology import REQUESTS, Exchange, Topology
from support.databases import fresh_database
from support.servers import MongoServer, RabbitServer

pytestmark = pytest.mark.real

MAIN = """
import os
from sublet_platform.batching import BatchLoop
from sublet_platform.service import Service, run_service
from sublet_platform.settings import ServiceSettings

async def start(service: Service, _: None) -> None:
    if os.environ.get("FAIL"):
        raise ValueError("a mistake in the settings")

    async def process(batch):
        print("handled", len(batch), flush=True)

    loop = BatchLoop(process, service.broker, service.metrics, name="timers")
    consumer = await service.broker.consume("sublet.timers", loop.handle, prefetch=10)
    loop.start()

    async def stop():
        await loop.rest()
        await consumer.close()
        await loop.stop()
        print("stopped", service.broker.connected, flush=True)

    service.on_stop(stop)
    print("shards", service.shards, flush=True)

run_service("timer", ServiceSettings(), start, lambda metrics: None)
"""


class Process:
    def __init__(self, process: asyncio.subprocess.Process, port: int) -> None:
        self._process = process
        self._port = port

    async def get(self, path: str) -> tuple[int, str]:
        return await asyncio.to_thread(self._get, path)

    def _get(self, path: str) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self._port}{path}", timeout=5) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()
        except OSError:
            return 0, ""

    async def until_status(self, path: str, status: int) -> str:
        async with asyncio.timeout(60):
            while True:
                found, body = await self.get(path)
                if found == status:
                    return body
                await asyncio.sleep(0.1)

    async def until_missing(self) -> dict[str, Any]:
        body: dict[str, Any] = json.loads(await self.until_status("/health", 503))
        missing: dict[str, Any] = body["missing"]
        return missing

    async def until_missing_only(self, *names: str) -> None:
        async with asyncio.timeout(60):
            while set(await self.until_missing()) != set(names):  # noqa: ASYNC110 - another process
                await asyncio.sleep(0.1)

    def terminate(self) -> None:
        self._process.send_signal(signal.SIGTERM)

    async def ended(self) -> tuple[int, str]:
        """Exit code and standard output."""
        async with asyncio.timeout(30):
            out, _ = await self._process.communicate()
        assert self._process.returncode is not None
        return self._process.returncode, out.decode()

    async def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        await self._process.communicate()


@contextlib.asynccontextmanager
async def a_service(directory: Path, amqp_url: str, mongo_url: str, **environment: str) -> AsyncIterator[Process]:
    main = directory / "main.py"
    main.write_text(MAIN)
    port = free_port()
    settings = {
        "SUBLET_AMQP_URL": amqp_url,
        "SUBLET_MONGO_URL": mongo_url,
        "SUBLET_HTTP_PORT": str(port),
        "SUBLET_LOG_FORMAT": "json",
        "SUBLET_MONGO_DATABASE": "sublet_test_service",
        **environment,
    }
    with (directory / "log").open("w") as log:
        process = Process(
            await asyncio.create_subprocess_exec(
                sys.executable, str(main), env=os.environ | settings, stdout=asyncio.subprocess.PIPE, stderr=log
            ),
            port,
        )
    try:
        yield process
    finally:
        await process.kill()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


async def test_a_service_becomes_ready_and_stops_gracefully(
    tmp_path: Path, own_rabbit: RabbitServer, own_mongo: MongoServer
) -> None:
    async with a_service(tmp_path, own_rabbit.url, own_mongo.url) as service:
        await service.until_status("/health", 200)
        assert (await service.get("/health/live"))[0] == 200
        assert (await service.get("/docs"))[0] == 200
        status, metrics = await service.get("/metrics")
        assert status == 200
        assert "sublet_store_seconds_bucket" in metrics
        assert "process_resident_memory_bytes" in metrics
        service.terminate()
        code, out = await service.ended()
    assert code == 0
    assert "stopped True" in out, "the shell stops before the broker is closed"
    assert [json.loads(line)["service"] for line in (tmp_path / "log").read_text().splitlines()]


async def test_a_service_reports_missing_servers_and_starts_when_they_are_available(
    tmp_path: Path, own_rabbit: RabbitServer, own_mongo: MongoServer
) -> None:
    await asyncio.to_thread(own_mongo.stop)
    await asyncio.to_thread(own_rabbit.stop)
    async with a_service(tmp_path, own_rabbit.url, own_mongo.url) as service:
        assert set(await service.until_missing()) == {"broker", "database", "start"}
        assert (await service.get("/health/live"))[0] == 200
        await asyncio.to_thread(own_rabbit.start)
        await service.until_missing_only("database", "start")
        await asyncio.to_thread(own_mongo.start)
        await service.until_status("/health", 200)
        await asyncio.to_thread(own_rabbit.kill)
        assert "broker" in await service.until_missing()
        await asyncio.to_thread(own_rabbit.start)
        await service.until_status("/health", 200)


async def test_a_service_that_waits_for_its_servers_can_be_stopped(tmp_path: Path) -> None:
    nowhere = f"127.0.0.1:{free_port()}"
    async with a_service(tmp_path, f"amqp://{nowhere}/", f"mongodb://{nowhere}/?directConnection=true") as service:
        await service.until_missing()
        service.terminate()
        code, _ = await service.ended()
    assert code == 0


async def test_a_service_whose_start_fails_logs_it_and_exits(
    tmp_path: Path, own_rabbit: RabbitServer, own_mongo: MongoServer
) -> None:
    async with a_service(tmp_path, own_rabbit.url, own_mongo.url, FAIL="1") as service:
        code, _ = await service.ended()
    assert code == 1
    assert "a mistake in the settings" in (tmp_path / "log").read_text()


async def test_the_shard_count_is_the_one_stored_in_the_database(
    tmp_path: Path, own_rabbit: RabbitServer, own_mongo: MongoServer
) -> None:
    async with fresh_database(own_mongo.url):
        database = "sublet_test_shards"
        for asked in ("2", "8"):
            async with a_service(
                tmp_path, own_rabbit.url, own_mongo.url, SUBLET_SHARDS=asked, SUBLET_MONGO_DATABASE=database
            ) as service:
                await service.until_status("/health", 200)
                service.terminate()
                _, out = await service.ended()
            assert "shards 2" in out


async def test_a_service_refuses_a_database_of_an_older_version(
    tmp_path: Path, own_rabbit: RabbitServer, own_mongo: MongoServer
) -> None:
    database = "sublet_test_older"
    older = connect(own_mongo.url, database)
    try:
        await older.set_once("settings", "fixed", {"values": {"shards": 4}})
        async with a_service(tmp_path, own_rabbit.url, own_mongo.url, SUBLET_MONGO_DATABASE=database) as service:
            code, out = await service.ended()
        assert await older.find_one("settings", {"_id": "fixed"}) == {"_id": "fixed", "values": {"shards": 4}}
    finally:
        await older.drop_database()
        older.close()
    assert code == 1
    assert out == "", "nothing of the service has started"
    error = the_critical_line(tmp_path)
    assert database in error
    assert "SUBLET_MONGO_DATABASE" in error


async def test_a_service_refuses_a_virtual_host_of_an_older_version(
    tmp_path: Path, own_rabbit: RabbitServer, own_mongo: MongoServer
) -> None:
    url = await new_virtual_host(own_rabbit, "older")
    await declare(url, Topology((Exchange(REQUESTS, "direct"),), (), ()))
    async with a_service(tmp_path, url, own_mongo.url) as service:
        code, out = await service.ended()
    assert code == 1
    assert out == "", "nothing of the service has started"
    error = the_critical_line(tmp_path)
    assert "'older'" in error
    assert "SUBLET_AMQP_URL" in error


async def test_services_that_start_at_once_on_a_fresh_virtual_host_accept_it(own_rabbit: RabbitServer) -> None:
    url = await new_virtual_host(own_rabbit, "fresh")
    await asyncio.gather(*(declare_topology(url, shards=4) for _ in range(8)))


async def new_virtual_host(rabbit: RabbitServer, name: str) -> str:
    """Create a virtual host. Returns its AMQP address."""
    await asyncio.to_thread(rabbit.ctl, "add_vhost", name)
    await asyncio.to_thread(rabbit.ctl, "set_permissions", "-p", name, "guest", ".*", ".*", ".*")
    return rabbit.url + name


def the_critical_line(directory: Path) -> str:
    """The only line of level critical in the log. It has no traceback."""
    lines = [json.loads(line) for line in (directory / "log").read_text().splitlines()]
    (critical,) = (line for line in lines if line["level"] == "critical")
    assert "exception" not in critical
    text: str = critical["event"]
    return text
