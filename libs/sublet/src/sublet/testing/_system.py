"""The whole of Sublet in memory: broker, database, one of each service, and the way to leap over idle times."""

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
from sublet_platform.metrics import IngestMetrics, ServiceMetrics, TimerMetrics
from sublet_protocol import limits
from sublet_protocol.topology import topology
from sublet_scheduler.scheduler import Scheduler
from sublet_timer.service import TimerService

SHARDS = 1

CALM_S = 5.0
"""Nothing has been written for this long: whatever would be asked again, or ends after a moment of grace, has been."""

TIMER_LEAD_S = 2 * limits.TICK_INTERVAL_S
"""A leap ends this long before a timer is due: the timer service finds out again that it is the active one."""

DEADLINE_LEAD_S = limits.WORKER_SILENT_S + 2.0
"""And this long before a deadline: a scheduler that heard no tick for a while strikes none at first."""

FOR_LONG_S = 1.0
"""A stay that looks again sooner is polling."""


class Clock:
    """The wall's clock of the world."""

    def __init__(self, loop: WorldLoop, starts_at: float) -> None:
        self._loop = loop
        self._starts_at = starts_at

    def now(self) -> float:
        return self._starts_at + self._loop.time()

    def in_loop_time(self, at: float) -> float:
        return at - self._starts_at


class ProcessTransport(MemoryTransport):
    """A worker's connection. What arrives is handled by its process."""

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
        """The process has died, and its socket with it."""
        self._closed = True
        self._cut()
        if self in self._cluster.connections:
            self._cluster.connections.remove(self)


class InMemorySystem:
    """Attributes:

    live_workers: the ids of those that have not died.
    skips: the ends of the skips that are under way, in the loop's time.
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
        """The same in every test run."""
        return str(uuid.UUID(bytes=hashlib.sha256(f"id {next(self._numbers)}".encode()).digest()[:16], version=4))

    def transport(self, process: Process | None = None) -> ProcessTransport:
        return ProcessTransport(self.cluster, self.loop, process)

    @contextmanager
    def redirecting(self, connection: Connection) -> Iterator[None]:
        """Whoever uses this connection gets to this world."""

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
        ).start()
        await TimerService(
            store=MemoryTimerStore(self.database),
            broker=MemoryBroker(self.cluster),
            clock=self.clock,
            shards=SHARDS,
            metrics=metrics,
            timer_metrics=TimerMetrics(metrics.registry),
        ).start()
        await IngestService(
            store=MemoryEventStore(self.database),
            runs=MemoryRunStore(self.database, self.clock),
            broker=MemoryBroker(self.cluster),
            clock=self.clock,
            new_id=self.new_id,
            metrics=metrics,
            ingest_metrics=IngestMetrics(metrics.registry),
            shards=SHARDS,
        ).start()

    async def _notice(self, operation: str) -> None:
        if operation in ("commit", "change_timers"):
            self._changed_at = self.loop.time()

    # --- time ---------------------------------------------------------------------------------------------------

    def next_jump(self) -> float | None:
        """When the next thing is due. Over times in which only heartbeats and ticks would pass, further ahead."""
        now = self.loop.time()
        step = self.loop.timers[0].when()
        if now - self._changed_at < CALM_S or now - self._looked_at < 1.0 or self._someone_is_missed():
            return step
        self._looked_at = now
        leap = min((*self._leaps(), *self.skips), default=None)
        return None if leap is None else max(step, leap)

    def _someone_is_missed(self) -> bool:
        """A worker died with a task in its hands: its silence is being counted."""
        leases = (task.lease for run in self._unfinished() for task in run.tasks)
        return any(lease is not None and lease.worker not in self.live_workers for lease in leases)

    def _leaps(self) -> Iterator[float]:
        """Up to where a leap misses nothing of what will happen by itself, in the loop's time."""
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
        """The user's code set it, or a durable task's stay that will end."""
        if handle._context.get(current_context) is not None:  # type: ignore[attr-defined]
            return True
        stays = isinstance(getattr(handle._callback, "__self__", None), DurableInvocation)  # type: ignore[attr-defined]
        return stays and handle.when() - self.loop.time() > FOR_LONG_S

    def _unfinished(self) -> Iterator[Run]:
        return (run for run in self.database.runs.values() if not run.terminal)

    # --- words --------------------------------------------------------------------------------------------------

    def explain(self) -> str:
        """Why the runs that have not ended do not."""
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
