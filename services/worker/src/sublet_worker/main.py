"""``sublet-worker module:attr``: a worker with an HTTP side: /health, /health/live, /metrics, /docs."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import signal
import sys
from collections.abc import Iterator

import uvicorn
from faststream.asgi import AsgiFastStream
from faststream.specification import AsyncAPI
from prometheus_client import make_asgi_app

from sublet._worker.worker import Worker, WorkerStatus
from sublet_platform.health import Health, health_routes
from sublet_platform.logging import set_up_logging
from sublet_platform.metrics import new_registry
from sublet_worker.app import BadApp, load_worker
from sublet_worker.metrics import show
from sublet_worker.settings import WorkerSettings

logger = logging.getLogger(__name__)


class WorkerService:
    """Runs a worker until a signal comes. HTTP answers from before the start until after the last task has ended."""

    def __init__(self, worker: Worker, settings: WorkerSettings) -> None:
        self._worker = worker
        self._settings = settings
        self._stopping = asyncio.Event()

    async def serve(self) -> bool:
        """False: the worker could not start."""
        server = _Server(
            uvicorn.Config(
                self._app(),
                host=self._settings.http_host,
                port=self._settings.http_port,
                log_config=None,
                access_log=False,
                lifespan="off",  # FastStream's would start a broker, and a worker has none of that kind
                timeout_graceful_shutdown=1,
            )
        )
        with self._signals():
            serving = asyncio.ensure_future(_serve_http(server))
            working = asyncio.ensure_future(self._work())
            await asyncio.wait([serving, working], return_when=asyncio.FIRST_COMPLETED)
            self._stopping.set()  # when HTTP ended first: its port is taken, for instance
            worked = await working
            server.should_exit = True
            served = await serving
        return worked and served

    async def _work(self) -> bool:
        starting = asyncio.ensure_future(self._worker.aio_start())
        stopping = asyncio.ensure_future(self._stopping.wait())
        await asyncio.wait([starting, stopping], return_when=asyncio.FIRST_COMPLETED)
        if not starting.done():
            starting.cancel()
        try:
            await starting
        except asyncio.CancelledError:
            return True
        except Exception:
            logger.critical("worker %s cannot start", self._worker.name, exc_info=True)
            stopping.cancel()
            return False
        await stopping
        await self._worker.stop()
        return True

    def _app(self) -> AsgiFastStream:
        registry = new_registry()
        show(self._worker, registry)
        health = Health()
        health.add("worker", self._what_is_wrong)
        return AsgiFastStream(
            asgi_routes=[*health_routes(health), ("/metrics", make_asgi_app(registry))],
            asyncapi_path="/docs",
            specification=AsyncAPI(title=f"Sublet worker {self._worker.name}"),
            logger=None,
        )

    async def _what_is_wrong(self) -> str | None:
        status = self._worker.status
        return None if status is WorkerStatus.HEALTHY else f"{status.lower()}: {_MEANING[status]}"

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """The first one ends in good order, the second at once."""
        loop = asyncio.get_running_loop()
        signals = (signal.SIGTERM, signal.SIGINT)
        for each in signals:
            loop.add_signal_handler(each, self._on_signal)
        try:
            yield
        finally:
            for each in signals:
                loop.remove_signal_handler(each)

    def _on_signal(self) -> None:
        if self._stopping.is_set():
            os._exit(1)
        self._stopping.set()


_MEANING = {
    WorkerStatus.INITIALIZED: "about to start",
    WorkerStatus.STARTING: "waits for RabbitMQ, and for a scheduler that declares what it needs there",
    WorkerStatus.UNHEALTHY: "not connected to RabbitMQ; what runs goes on",
    WorkerStatus.STOPPING: "finishes what runs, and takes nothing new",
    WorkerStatus.STOPPED: "has left",
}


async def _serve_http(server: uvicorn.Server) -> bool:
    """False: it could not begin. (uvicorn would end the process, and what the worker has to do before.)"""
    try:
        await server.serve()
    except SystemExit:
        return False
    return server.started


class _Server(uvicorn.Server):
    """Leaves signals to us."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def main() -> None:
    parser = argparse.ArgumentParser(prog="sublet-worker", description=__doc__)
    parser.add_argument("app", metavar="module:attr", help="a sublet.Worker, or a function that returns one")
    place = parser.parse_args().app
    settings = WorkerSettings()
    set_up_logging("worker", level=settings.log_level, form=settings.log_format)
    try:
        worker = load_worker(place)
    except BadApp as error:
        sys.exit(f"sublet-worker: {error}")

    async def serve() -> bool:
        return await WorkerService(worker, settings).serve()

    if not asyncio.run(serve()):
        sys.exit(1)
