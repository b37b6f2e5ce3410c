"""The common part of all services: connections that are retried, HTTP endpoints, signals and a graceful stop.

A service passes `run_service` a function that starts it once broker, topology and database are available. The function
is called again if a server fails meanwhile. The metrics of the service are made once, before the first call::

    async def start(service: Service, timer_metrics: TimerMetrics) -> None:
        store = MongoTimerStore(service.mongo)
        await store.ensure_indexes()
        timer = TimerService(store, service.broker, service.clock, service.metrics, timer_metrics)
        service.on_stop(timer.stop)
        await timer.start()

    def main() -> None:
        run_service("timer", ServiceSettings(), start, TimerMetrics)
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
import uuid
from collections.abc import Awaitable, Callable, Iterator
from typing import TypeVar

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
from sublet_platform.signals import stop_signals
from sublet_protocol.backoff import Backoff
from sublet_protocol.topology import FORMAT

logger = logging.getLogger(__name__)

STOP_TIMEOUT_S = 8.0
"""The time that one part has to stop. Docker kills a container after 10 s."""

M = TypeVar("M")
Start = Callable[["Service", M], Awaitable[None]]
Stop = Callable[[], Awaitable[None]]


class Service:
    """The resources of a service process. It must be created in a running event loop.

    Attributes:
        shards: the number of shards. It is final once the start function is called.
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
        """Call this function at the end, while the servers are connected. The last one registered runs first."""
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

    # --- start and stop ---------------------------------------------------------------------------------------------

    async def serve(self, start: Start[M], service_metrics: M) -> bool:
        """Run until a signal arrives. False: the start failed permanently."""

        async def bring_up() -> None:
            try:
                await self._bring_up(start, service_metrics)
            except IncompatibleFormat as error:
                logger.critical("%s cannot start: %s", self.name, error)
                self._failed = True
                server.should_exit = True
            except Exception:
                logger.critical("%s cannot start", self.name, exc_info=True)
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
            # Only after FastStream has connected, because it would connect a second time.
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

    async def _bring_up(self, start: Start[M], service_metrics: M) -> None:
        backoff = Backoff()
        while True:
            try:
                await self.broker.open()
                self.shards = await self._stored_shard_count()
                await declare_topology(self.settings.amqp_url, self.shards)
                await start(self, service_metrics)
            except (StoreUnavailable, BrokerUnavailable) as error:
                await self._call_stops()
                delay_s = backoff.next_s()
                logger.warning("%s cannot start yet: %s; retrying in %.1f s", self.name, error, delay_s)
                await asyncio.sleep(delay_s)
            else:
                self._ready = True
                logger.info("%s is ready", self.name, extra={"shards": self.shards})
                return

    async def _stored_shard_count(self) -> int:
        stored = await MongoSettingsStore(self.mongo).claim({"shards": self.settings.shards, "format": FORMAT})
        check_database(self.settings.mongo_database, stored)
        shards = int(stored["shards"])
        if shards != self.settings.shards:
            logger.warning(
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
        logger.info("%s has stopped", self.name)

    async def _call_stops(self) -> None:
        while self._stops:
            stop = self._stops.pop()
            try:
                async with asyncio.timeout(STOP_TIMEOUT_S):
                    await stop()
            except Exception:
                logger.exception("graceful shutdown of %s failed", self.name)


class _Server(uvicorn.Server):
    """Exits with status 0 after a graceful stop. A second signal ends the process at once."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        with stop_signals(self._begin_stop):
            yield

    def _begin_stop(self) -> None:
        self.should_exit = True


def run_service(
    name: str, settings: ServiceSettings, start: Start[M], make_metrics: Callable[[ServiceMetrics], M]
) -> None:
    """Run a service until SIGTERM or SIGINT. Exit with 1 if it cannot start although the servers are available."""
    set_up_logging(name, level=settings.log_level, form=settings.log_format)

    async def serve() -> bool:
        service = Service(name, settings)
        return await service.serve(start, make_metrics(service.metrics))

    if not asyncio.run(serve()):
        sys.exit(1)
