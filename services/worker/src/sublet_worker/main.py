"""``sublet-worker module:attr``: runs a worker, with the HTTP endpoints /health, /health/live, /metrics and /docs."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
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
from sublet_platform.signals import stop_signals
from sublet_worker.app import BadApp, load_worker
from sublet_worker.metrics import show
from sublet_worker.settings import WorkerSettings

logger = logging.getLogger(__name__)


class WorkerService:
    """Runs a worker until a signal arrives. The HTTP endpoints answer until the last task has ended."""

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
                lifespan="off",  # FastStream's lifespan would start a broker, which a worker does not have
                timeout_graceful_shutdown=1,
            )
        )
        with stop_signals(self._stopping.set):
            serving = asyncio.ensure_future(_serve_http(server))
            working = asyncio.ensure_future(self._work())
            await asyncio.wait([serving, working], return_when=asyncio.FIRST_COMPLETED)
            self._stopping.set()  # if HTTP ended first, for example because its port is in use
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
        health.add("worker", self._problem)
        return AsgiFastStream(
            asgi_routes=[*health_routes(health), ("/metrics", make_asgi_app(registry))],
            asyncapi_path="/docs",
            specification=AsyncAPI(title=f"Sublet worker {self._worker.name}"),
            logger=None,
        )

    async def _problem(self) -> str | None:
        status = self._worker.status
        return None if status is WorkerStatus.HEALTHY else f"{status.lower()}: {_MEANING[status]}"


_MEANING = {
    WorkerStatus.INITIALIZED: "not started yet",
    WorkerStatus.STARTING: "waits for RabbitMQ, and for a scheduler that declares the exchanges and queues",
    WorkerStatus.UNHEALTHY: "not connected to RabbitMQ; running tasks continue",
    WorkerStatus.STOPPING: "finishes the running tasks, and takes no new ones",
    WorkerStatus.STOPPED: "has stopped",
}


async def _serve_http(server: uvicorn.Server) -> bool:
    """False: it could not start. Then uvicorn raises SystemExit, which would end the process too early."""
    try:
        await server.serve()
    except SystemExit:
        return False
    return server.started


class _Server(uvicorn.Server):
    """A server that does not handle signals."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def main() -> None:
    parser = argparse.ArgumentParser(prog="sublet-worker", description=__doc__)
    parser.add_argument("app", metavar="module:attr", help="a sublet.Worker, or a function that returns one")
    app_path = parser.parse_args().app
    settings = WorkerSettings()
    set_up_logging("worker", level=settings.log_level, form=settings.log_format)
    try:
        worker = load_worker(app_path)
    except BadApp as error:
        sys.exit(f"sublet-worker: {error}")

    async def serve() -> bool:
        return await WorkerService(worker, settings).serve()

    if not asyncio.run(serve()):
        sys.exit(1)
