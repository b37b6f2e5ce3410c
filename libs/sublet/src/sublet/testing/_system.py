"""A complete Sublet in memory: broker, database and one of each service. Idle virtual time is skipped."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

from sublet._client.config import ClientConfig
from sublet._client.connection import Connection
from sublet._durable.invocation import DurableInvocation
from sublet._errors import TransportUnavailable
from sublet._worker.context import current_context
from sublet.testing._driver import Driver
from sublet.testing._loop import Process, WorldLoop
from sublet_engine.run.explain import why
from sublet_engine.run.state import Run
from sublet_engine.shard.deadlines import deadline_of
from sublet_event_ingest.metrics import IngestMetrics
from sublet_event_ingest.service import IngestService
from sublet_platform.memory import (
    MemoryBroker,
    MemoryCluster,
    MemoryDatabase,
    MemoryEventStore,
    MemoryRunStore,
    MemoryTimerStore,
    MemoryTransport,
)
from sublet_platform.memory.cluster import Message, Subscription
from sublet_platform.memory.connection import Registration
from sublet_platform.metrics import ServiceMetrics
from sublet_protocol import limits
from sublet_protocol.topology import topology
from sublet_scheduler.metrics import SchedulerMetrics
from sublet_scheduler.scheduler import Scheduler
from sublet_timer.metrics import TimerMetrics
from sublet_timer.service import TimerService

SHARDS = 1

IDLE_S = 5.0
"""Seconds without a write after which idle time may be skipped: all retries and grace periods are shorter."""

TIMER_LEAD_S = 2 * limits.TICK_INTERVAL_S
"""A skip ends this many seconds before a timer is due, so that the timer service can become active again."""

DEADLINE_LEAD_S = limits.WORKER_SILENT_S + 2.0
"""A skip ends this many seconds before a deadline: after a pause a scheduler does not expire deadlines at once."""

LONG_CHECK_S = 1.0
"""An invocation whose next check is sooner than this many seconds is polling."""


class Clock:
    """The wall clock of the simulated system, in Unix seconds."""

    def __init__(self, loop: WorldLoop, starts_at: float) -> None:
        self._loop = loop
        self._starts_at = starts_at

    def now(self) -> float:
        return self._starts_at + self._loop.time()

    def in_loop_time(self, at: float) -> float:
        return at - self._starts_at


class ProcessTransport(MemoryTransport):
    """The connection of a worker. Arriving messages are handled by its process."""

    def __init__(self, cluster: MemoryCluster, loop: WorldLoop, process: Process | None) -> None:
        super().__init__(cluster, unavailable=TransportUnavailable)
        self._loop = loop
        self._process = process

    def _register(self, registration: Registration) -> None:
        receive = registration.receive

        def receive_as_process(subscription: Subscription, tag: int, message: Message) -> None:
            with self._loop.acting_as(self._process):
                receive(subscription, tag, message)

        registration.receive = receive_as_process
        super()._register(registration)

    def vanish(self) -> None:
        """Drop the connection without a close, as when a process is killed."""
        self._closed = True
        self._cut()
        if self in self._cluster.connections:
            self._cluster.connections.remove(self)


class InMemorySystem:
    """Broker, database and services in memory.

    Attributes:
        live_workers: ids of the workers that are not killed or stopped.
        skips: ends of the current skips, in seconds of the loop's time.
    """

    def __init__(self, starts_at: float) -> None:
        self.loop = WorldLoop()
        self.clock = Clock(self.loop, starts_at)
        self.database = MemoryDatabase()
        self.database.after = self._notice
        self.cluster = MemoryCluster()
        self.cluster.declare(topology(SHARDS))
        self.driver = Driver(self.loop, self.next_jump, self.explain)
        self.live_workers: set[str] = set()
        self.skips: list[float] = []
        self._numbers = itertools.count(1)
        self._changed_at = 0.0
        self._looked_at = -1.0

    def new_id(self) -> str:
        """A new id. The ids are the same in every run of a test."""
        return str(uuid.UUID(bytes=hashlib.sha256(f"id {next(self._numbers)}".encode()).digest()[:16], version=4))

    def transport(self, process: Process | None = None) -> ProcessTransport:
        return ProcessTransport(self.cluster, self.loop, process)

    @contextmanager
    def redirecting(self, connection: Connection) -> Iterator[None]:
        """Redirect a connection of a client to this system in a ``with`` block."""

        def connect(_: ClientConfig) -> ProcessTransport:
            return self.transport()

        with connection.redirected(self.driver, connect, now=self.clock.now, new_id=self.new_id):
            yield

    # --- services -----------------------------------------------------------------------------------------------

    async def start(self) -> None:
        metrics = ServiceMetrics()
        await Scheduler(
            scheduler_id="scheduler",
            shards=SHARDS,
            store=MemoryRunStore(self.database, self.clock),
            broker=MemoryBroker(self.cluster),
            clock=self.clock,
            new_id=self.new_id,
            metrics=metrics,
            scheduler_metrics=SchedulerMetrics(metrics),
        ).start()
        await TimerService(
            store=MemoryTimerStore(self.database),
            broker=MemoryBroker(self.cluster),
            clock=self.clock,
            shards=SHARDS,
            metrics=metrics,
            timer_metrics=TimerMetrics(metrics),
        ).start()
        await IngestService(
            store=MemoryEventStore(self.database),
            runs=MemoryRunStore(self.database, self.clock),
            broker=MemoryBroker(self.cluster),
            clock=self.clock,
            new_id=self.new_id,
            metrics=metrics,
            ingest_metrics=IngestMetrics(metrics),
            shards=SHARDS,
        ).start()

    async def _notice(self, operation: str) -> None:
        if operation in ("commit", "change_timers"):
            self._changed_at = self.loop.time()

    # --- time ---------------------------------------------------------------------------------------------------

    def next_jump(self) -> float | None:
        """The time of the next due timer, or a later one if only heartbeats and ticks would happen until then."""
        now = self.loop.time()
        step = self.loop.timers[0].when()
        if now - self._changed_at < IDLE_S or now - self._looked_at < 1.0 or self._a_worker_is_lost():
            return step
        self._looked_at = now
        skip_to = min((*self._skip_limits(), *self.skips), default=None)
        return None if skip_to is None else max(step, skip_to)

    def _a_worker_is_lost(self) -> bool:
        """A killed worker still holds a lease, so its silence has to be noticed."""
        leases = (task.lease for run in self._unfinished() for task in run.tasks)
        return any(lease is not None and lease.worker not in self.live_workers for lease in leases)

    def _skip_limits(self) -> Iterator[float]:
        """Times before which nothing but heartbeats and ticks happens, in seconds of the loop's time."""
        for timer in self.database.timers.values():
            yield self.clock.in_loop_time(timer.due) - TIMER_LEAD_S
        for run in self._unfinished():
            for task in run.tasks:
                if (deadline := deadline_of(task)) is not None:
                    yield self.clock.in_loop_time(deadline) - DEADLINE_LEAD_S
        for handle in self.loop.timers:
            owner = self.loop.owner_of(handle)
            if not handle.cancelled() and (owner is None or not owner.gone) and self._is_of_a_task(handle):
                yield handle.when()

    def _is_of_a_task(self, handle: asyncio.TimerHandle) -> bool:
        """The timer was set by code of the user, or by the invocation of a durable task."""
        if handle._context.get(current_context) is not None:  # type: ignore[attr-defined]
            return True
        of_invocation = isinstance(getattr(handle._callback, "__self__", None), DurableInvocation)  # type: ignore[attr-defined]
        return of_invocation and handle.when() - self.loop.time() > LONG_CHECK_S

    def _unfinished(self) -> Iterator[Run]:
        return (run for run in self.database.runs.values() if not run.terminal)

    # --- explanation --------------------------------------------------------------------------------------------------

    def explain(self) -> str:
        """A text that says why runs have not ended."""
        specs = {(record.spec.name, record.spec.version): record.spec for record in self.database.workflows.values()}
        pools: dict[str, set[str]] = {}
        for worker in self.database.workers.values():
            for action in worker.actions if worker.id in self.live_workers else ():
                pools.setdefault(action, set()).add(worker.pool)
        texts = [
            str(why(run, specs.get((run.workflow, run.version)), pools, self.clock.now())["text"])
            for run in self._unfinished()
        ]
        return "\n".join(["nothing is due any more, and these runs have not ended:", *texts])
