"""``sublet-worker``: loading the worker, HTTP endpoints and stop."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from sublet._declare.types import EmptyModel
from sublet._worker.worker import Worker
from sublet_protocol.messages import Finished, Goodbye
from sublet_worker.app import BadApp, load_worker
from sublet_worker.main import WorkerService
from sublet_worker.settings import WorkerSettings
from support.polling import TIMEOUT_S, until
from support.worker_harness import WorkerHarness, client

APP = """
from support.worker_harness import WorkerHarness, BenchTransport, client

@client.task(name="appy")
async def task(input, ctx) -> None: ...

def make():
    return client.worker("w", workflows=[task])

worker = make()
number = 7

class Inner:
    worker = worker

def broken():
    return None
"""


@pytest.fixture
def app(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module in the current directory."""
    (tmp_path / "shop_app.py").write_text(APP)
    (tmp_path / "bad_app.py").write_text("import not_installed_anywhere")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "shop_app", raising=False)
    return "shop_app"


@pytest.mark.parametrize("attr", ["worker", "make", "Inner.worker"])
def test_the_app_path_names_a_worker_or_a_function_that_returns_one(app: str, attr: str) -> None:
    assert isinstance(load_worker(f"{app}:{attr}"), Worker)


@pytest.mark.parametrize(
    ("app_path", "says"),
    [
        ("shop_app", "not of the form module:attr"),
        ("shop_app:", "not of the form module:attr"),
        ("nowhere.at_all:worker", "no module 'nowhere.at_all'"),
        ("shop_app:absent", "has no 'absent'"),
        ("shop_app:number", "neither a sublet.Worker"),
        ("shop_app:broken", "neither a sublet.Worker"),
    ],
)
def test_an_app_path_without_a_worker_is_refused_with_a_reason(app: str, app_path: str, says: str) -> None:
    with pytest.raises(BadApp, match=says):
        load_worker(app_path)


def test_an_import_error_inside_the_module_is_raised_as_it_is(app: str) -> None:
    with pytest.raises(ModuleNotFoundError, match="not_installed_anywhere"):
        load_worker("bad_app:worker")


resume = asyncio.Event()


@client.task(name="patient")
async def patient(input: EmptyModel, ctx: Any) -> None:
    await resume.wait()


def _get(port: int, path: str) -> tuple[int, str]:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"http://127.0.0.1:{port}{path}", timeout=5) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()
    except OSError:
        return 0, ""


async def get(port: int, path: str) -> tuple[int, str]:
    return await asyncio.to_thread(_get, port, path)


async def until_it_listens(port: int) -> None:
    async with asyncio.timeout(TIMEOUT_S):
        while await get(port, "/health/live") == (0, ""):  # noqa: ASYNC110 - it has no other way to tell
            await asyncio.sleep(0.01)


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port: int = taken.getsockname()[1]
        return port


async def test_the_service_shows_health_and_metrics_and_stops_gracefully() -> None:
    port = free_port()
    harness = WorkerHarness(patient)
    service = WorkerService(harness.worker, WorkerSettings(http_port=port))
    serving = asyncio.create_task(service.serve())
    await until(lambda: harness.transport._pools)
    await until_it_listens(port)
    assert await get(port, "/health/live") == (200, '{"status":"alive"}')
    assert await get(port, "/health") == (200, '{"status":"ok"}')
    harness.run(patient)
    await until(lambda: harness.worker.held)
    _, metrics = await get(port, "/metrics")
    assert 'sublet_worker_slots{kind="task"} 100.0' in metrics
    assert 'sublet_worker_tasks{state="running"} 1.0' in metrics
    assert (await get(port, "/docs"))[0] == 200
    os.kill(os.getpid(), signal.SIGTERM)
    status, body = await get(port, "/health")
    assert status == 503
    assert "stopping" in body
    resume.set()
    assert await serving
    assert harness.of(Finished)
    assert any(isinstance(r, Goodbye) for _, _, records in harness.transport.sent for r in records)


async def test_a_worker_that_cannot_start_ends_the_service() -> None:
    async def lifespan() -> Any:
        raise RuntimeError("no database")
        yield

    harness = WorkerHarness(patient, lifespan=lifespan)
    assert not await WorkerService(harness.worker, WorkerSettings(http_port=free_port())).serve()


async def test_a_port_in_use_ends_the_service_and_stops_its_worker() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        harness = WorkerHarness(patient)
        assert not await WorkerService(harness.worker, WorkerSettings(http_port=taken.getsockname()[1])).serve()
        assert harness.transport.closed
