"""What every service's ``main`` has in common: servers that may be away, HTTP, signals, a stop in good order.

A service gives `run_service` a function that starts its shell once broker, topology and database are there::

    async def start(service: Service) -> None:
        store = MongoTimerStore(service.mongo)
        await store.ensure_indexes()
        shell = TimerShell(store, service.broker, service.clock, service.metrics)
        service.on_stop(shell.stop)
        await shell.start()

    def main() -> None:
        run_service("timer", ServiceSettings(), start)
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
import uuid
from collections.abc import Awaitable, Callable, Iterator

import uvicorn
from faststream.asgi import AsgiFastStream
from faststream.specification import AsyncAPI
from prometheus_client import make_asgi_app

from sublet_platform.clock import SystemClock
from sublet_platform.compatibility import IncompatibleFormat, check_database
from sublet_platform.health import Health, health_routes
from sublet_platform.logging import set_up_logging
from sublet_platform.metrics import ServiceMetrics, new_registry
from sublet_platform.mongo.client import Mongo, connect
from sublet_platform.mongo.settings import MongoSettingsStore
from sublet_platform.ports import BrokerUnavailable, StoreUnavailable
from sublet_platform.rabbit.broker import Rabbit, declare_topology
from sublet_platform.settings import ServiceSettings
from sublet_protocol.backoff import Backoff
from sublet_protocol.topology import FORMAT

log = logging.getLogger(__name__)

STOP_TIMEOUT_S = 8.0
"""For what is in hand at a stop; Docker kills after 10 s."""

Start = Callable[["Service"], Awaitable[None]]
Stop = Callable[[], Awaitable[None]]


class Service:
    """What a shell is built from. Must be made where the event loop runs.

    Attributes:
        shards: the number of shards in force, once the start function is called.
    """

    def __init__(self, name: str, settings: ServiceSettings) -> None:
        self.name = name
        self.settings = settings
        self.shards = settings.shards
        self.clock = SystemClock()
        self.registry = new_registry()
        self.metrics = ServiceMetrics(self.registry)
        self.health = Health()
        self.broker = Rabbit(settings.amqp_url, name=f"sublet-{name}", on_published=self.metrics.published)
        self.mongo: Mongo = connect(settings.mongo_url, settings.mongo_database, on_seconds=self.metrics.store)
        self._stops: list[Stop] = []
        self._starting: asyncio.Task[None] | None = None
        self._ready = False
        self._failed = False
        self.health.add("database", self._database_is_missing)
        self.health.add("broker", self._broker_is_missing)
        self.health.add("start", self._start_is_missing)

    @staticmethod
    def new_id() -> str:
        return str(uuid.uuid4())

    def on_stop(self, stop: Stop) -> None:
        """Called at the end while broker and database are still there; what was registered last stops first."""
        self._stops.append(stop)

    # --- health -------------------------------------------------------------------------------------------

    async def _database_is_missing(self) -> str | None:
        try:
            await self.mongo.ping()
        except StoreUnavailable as error:
            return str(error)
        return None

    async def _broker_is_missing(self) -> str | None:
        return None if self.broker.connected else "not connected"

    async def _start_is_missing(self) -> str | None:
        return None if self._ready else "not started yet"

    # --- life ---------------------------------------------------------------------------------------------

    async def serve(self, start: Start) -> bool:
        """Run until a signal comes. False: the start failed for good."""

        async def bring_up() -> None:
            try:
                await self._bring_up(start)
            except IncompatibleFormat as error:
                log.critical("%s cannot start: %s", self.name, error)
                self._failed = True
                server.should_exit = True
            except Exception:
                log.critical("%s cannot start", self.name, exc_info=True)
                self._failed = True
                server.should_exit = True

        async def begin() -> None:
            self._starting = asyncio.get_running_loop().create_task(bring_up())

        app = AsgiFastStream(
            self.broker.faststream,
            asgi_routes=[*health_routes(self.health), ("/metrics", make_asgi_app(self.registry))],
            asyncapi_path="/docs",
            specification=AsyncAPI(title=f"Sublet {self.name}"),
            logger=None,
            # Not before FastStream has connected: it would connect a second time.
            after_startup=[begin],
            on_shutdown=[self._stop],
        )
        server = _Server(
            uvicorn.Config(
                app,
                host=self.settings.http_host,
                port=self.settings.http_port,
                log_config=None,
                access_log=False,
                lifespan="on",
                timeout_graceful_shutdown=1,
            )
        )

        await server.serve()
        return not self._failed

    async def _bring_up(self, start: Start) -> None:
        backoff = Backoff()
        while True:
            try:
                await self.broker.open()
                self.shards = await self._shards_in_force()
                await declare_topology(self.settings.amqp_url, self.shards)
                await start(self)
            except (StoreUnavailable, BrokerUnavailable) as error:
                await self._call_stops()
                delay_s = backoff.next_s()
                log.warning("%s cannot start yet: %s; again in %.1f s", self.name, error, delay_s)
                await asyncio.sleep(delay_s)
            else:
                self._ready = True
                log.info("%s works", self.name, extra={"shards": self.shards})
                return

    async def _shards_in_force(self) -> int:
        stored = await MongoSettingsStore(self.mongo).claim({"shards": self.settings.shards, "format": FORMAT})
        check_database(self.settings.mongo_database, stored)
        shards = int(stored["shards"])
        if shards != self.settings.shards:
            log.warning(
                "the shard count of this database is fixed at %d; SUBLET_SHARDS=%d is ignored",
                shards,
                self.settings.shards,
            )
        return shards

    async def _stop(self) -> None:
        if self._starting is not None:
            self._starting.cancel()
            await asyncio.gather(self._starting, return_exceptions=True)
        self._ready = False
        await self._call_stops()
        await self.broker.close()
        self.mongo.close()
        log.info("%s has stopped", self.name)

    async def _call_stops(self) -> None:
        while self._stops:
            stop = self._stops.pop()
            try:
                async with asyncio.timeout(STOP_TIMEOUT_S):
                    await stop()
            except Exception:
                log.exception("a part of %s did not stop in good order", self.name)


class _Server(uvicorn.Server):
    """Ends with exit code 0 on the first signal, when all is in order, and at once on the second."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
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
        if self.should_exit:
            os._exit(1)
        self.should_exit = True


def run_service(name: str, settings: ServiceSettings, start: Start) -> None:
    """Run a service until SIGTERM or SIGINT; exits with 1 if it cannot start although the servers are there."""
    set_up_logging(name, level=settings.log_level, form=settings.log_format)

    async def serve() -> bool:
        return await Service(name, settings).serve(start)

    if not asyncio.run(serve()):
        sys.exit(1)
