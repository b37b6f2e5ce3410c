"""The whole system in one process: services, workers and a client on one broker and one database, in virtual time."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import uuid
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from random import Random
from typing import Any, Protocol

from simulation.checkers.history import History
from simulation.checkers.observers import Observers
from simulation.scenarios.plan import Plan
from simulation.scenarios.workloads import HELPED
from simulation.system.declarations import declare
from simulation.system.network import Broker, Cluster, NetworkConditions, Transport
from simulation.system.processes import Process, ProcessLoop
from simulation.system.storage import Database, RunStore
from sublet import ClientConfig, Sublet
from sublet_event_ingest.metrics import IngestMetrics
from sublet_event_ingest.service import IngestService
from sublet_platform.memory import MemoryEventStore, MemoryTimerStore
from sublet_platform.metrics import ServiceMetrics
from sublet_platform.ports import BrokerUnavailable, Outgoing, StoreUnavailable
from sublet_platform.service import STOP_TIMEOUT_S
from sublet_protocol.topology import topology
from sublet_scheduler.metrics import SchedulerMetrics
from sublet_scheduler.scheduler import Scheduler
from sublet_timer.metrics import TimerMetrics
from sublet_timer.service import TimerService

Link = Broker | Transport

RESTART_DELAY_S = 0.5
"""A service that cannot start tries again after this time."""


@dataclass
class ProcessRole:
    """The process that has a role at present. ``stop`` shuts it down gracefully."""

    name: str
    process: Process
    links: list[Link] = field(default_factory=list)
    stop: Callable[[], Coroutine[Any, Any, None]] | None = None

    def cut(self, down_s: float) -> None:
        for link in self.links:
            link.kill_connection(down_s)


class Service(Protocol):
    """The common interface of all services."""

    async def start(self) -> None: ...

    async def stop(self) -> None: ...


class Metrics(ServiceMetrics):
    """Passes on the anomalies that sweepers count."""

    def __init__(self, on_anomaly: Callable[[str, int], None]) -> None:
        super().__init__()
        self._on_anomaly = on_anomaly

    def count_anomalies(self, sweeper: str, count: int = 1) -> None:
        self._on_anomaly(sweeper, count)


class SimulatedSystem:
    """Must be created in a running `ProcessLoop`. ``verbose``: collect every message in the story."""

    def __init__(self, plan: Plan, *, verbose: bool = False) -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, ProcessLoop)
        self.loop = loop
        self.plan = plan
        self.verbose = verbose
        self.story: list[str] = []
        self.violations: list[str] = []
        self.anomalies: dict[str, int] = {}
        self.garbage = 0
        self.observers = Observers(self)
        self.history = History(loop.time, self.report_violation, self.observers.started)
        conditions = NetworkConditions(Random(plan.seed * 7 + 1))
        conditions.latency_s = plan.latency_s
        self.cluster = Cluster(loop, conditions, self.observers)
        self.cluster.declare(topology(plan.shards))
        store_random = Random(plan.seed * 7 + 2)
        self.database = Database(loop, store_random, plan.store_latency_s, self.observers.committed)
        self.config = ClientConfig(_env_file=None)
        self.roles: dict[str, ProcessRole] = {}
        self.version = 1
        """The version of the workflows that workers register when they start."""
        self.client: Sublet
        self.workflows: dict[str, Any] = {}
        self._random = Random(plan.seed * 7 + 3)
        self._numbers = itertools.count(1)
        self._outside = Broker(self.cluster, Process("outside", "outside"), self._random)

    # --- observations -------------------------------------------------------------------------------------------

    def report_violation(self, text: str) -> None:
        self.note(f"VIOLATION: {text}")
        self.violations.append(text)

    def note(self, text: str) -> None:
        self.story.append(f"{self.loop.time():9.4f}  {text}")

    def count_anomalies(self, sweeper: str, count: int) -> None:
        self.note(f"sweeper {sweeper} found {count}")
        self.anomalies[sweeper] = self.anomalies.get(sweeper, 0) + count

    # --- processes ----------------------------------------------------------------------------------------------

    async def begin(self) -> None:
        """Start everything, and the client."""
        await asyncio.gather(*(self.start(name) for name in self.plan.roles))
        role = self._take_role("client-0")
        self.client = self._sublet(role)
        self.workflows = self.declare(self.client)

    def declare(self, sublet: Sublet) -> dict[str, Any]:
        """The workflows that clients know and workers register."""
        return declare(sublet, self.plan, self.history, self.version)

    async def start(self, name: str) -> None:
        """Start a new process for a role, unless the role has one."""
        if name in self.roles:
            return
        role = self._take_role(name)
        bring_up = getattr(self, f"_start_{name.partition('-')[0]}")
        await self._in_process(role, bring_up(role))

    def kill(self, role: ProcessRole, flush: bool) -> None:
        """The process takes no further step. ``flush``: messages that it has written to its sockets still arrive."""
        if self.roles.get(role.name) is role:
            del self.roles[role.name]
        before, self.loop.process = self.loop.process, None
        role.process.gone = True
        role.process.deferred_steps.clear()
        for link in role.links:
            link.vanish(flush)
        self.loop.process = before

    async def stop(self, name: str) -> bool:
        """Shut a process down gracefully. False: there is none, or it stops already."""
        role = self.roles.get(name)
        if role is None or role.stop is None:
            return False
        stop, role.stop = role.stop, None
        await self._in_process(role, stop())
        if not role.process.gone:
            self.kill(role, flush=True)
        return True

    async def after_steps(self, role: ProcessRole, steps: int, act: Callable[[], None]) -> bool:
        """Call ``act`` after that many more steps of the process, right before its next one. False: the process has
        ended before that, or another fault waits for its steps already."""
        process = role.process
        if process.steps_left is not None:
            return False
        reached = asyncio.Event()

        def at_last_step() -> None:
            before, self.loop.process = self.loop.process, None
            act()
            reached.set()
            self.loop.process = before

        process.at_last_step = at_last_step
        process.steps_left = steps
        while not (reached.is_set() or process.gone):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(1.0):
                    await reached.wait()
        return reached.is_set()

    async def publish(self, message: Outgoing) -> None:
        """From outside, for sure."""
        while True:
            try:
                return await self._outside.publish([message])
            except BrokerUnavailable:
                await asyncio.sleep(0.1)

    async def _in_process(self, role: ProcessRole, work: Coroutine[Any, Any, None]) -> None:
        """Run something as this process. Returns when it has ended or the process is dead."""
        before, self.loop.process = self.loop.process, role.process
        task = self.loop.create_task(work)
        self.loop.process = before
        while not (task.done() or role.process.gone):
            await asyncio.wait([task], timeout=0.5)
        if task.done() and not task.cancelled() and task.exception() is not None:
            self.report_violation(f"{role.process.name} failed to start or to stop: {task.exception()!r}")

    # --- starting processes -------------------------------------------------------------------------------------

    def _take_role(self, name: str) -> ProcessRole:
        process = Process(f"{name}.{next(self._numbers)}", name, self.plan.skew_s.get(name, 0.0))
        role = self.roles[name] = ProcessRole(name, process)
        return role

    def _new_id(self) -> str:
        """A unique id in the form of a UUID, made from a number."""
        number = next(self._numbers)
        return str(uuid.UUID(int=(number * 0x9E3779B97F4A7C15 % 2**64) << 64 | number))

    def _broker(self, role: ProcessRole) -> Broker:
        broker = Broker(self.cluster, role.process, self._random)
        role.links.append(broker)
        return broker

    def _sublet(self, role: ProcessRole) -> Sublet:
        def connect(_: ClientConfig) -> Transport:
            transport = Transport(self.cluster, role.process, self._random)
            role.links.append(transport)
            return transport

        return Sublet(
            self.config, transport_factory=connect, background=False, now=role.process.clock.now, new_id=self._new_id
        )

    async def _start_scheduler(self, role: ProcessRole) -> None:
        broker = self._broker(role)
        scheduler_id = self._new_id()

        def create() -> Scheduler:
            metrics = Metrics(self.count_anomalies)
            return Scheduler(
                scheduler_id=scheduler_id,
                shards=self.plan.shards,
                store=RunStore(self.database, role.process.clock),
                broker=broker,
                clock=role.process.clock,
                new_id=self._new_id,
                metrics=metrics,
                scheduler_metrics=SchedulerMetrics(metrics),
            )

        await self._serve(role, broker, create)

    async def _start_timer(self, role: ProcessRole) -> None:
        broker = self._broker(role)

        def create() -> TimerService:
            metrics = Metrics(self.count_anomalies)
            return TimerService(
                store=MemoryTimerStore(self.database),
                broker=broker,
                clock=role.process.clock,
                shards=self.plan.shards,
                metrics=metrics,
                timer_metrics=TimerMetrics(metrics),
            )

        await self._serve(role, broker, create)

    async def _start_ingest(self, role: ProcessRole) -> None:
        broker = self._broker(role)

        def create() -> IngestService:
            metrics = Metrics(self.count_anomalies)
            return IngestService(
                store=MemoryEventStore(self.database),
                runs=RunStore(self.database, role.process.clock),
                broker=broker,
                clock=role.process.clock,
                new_id=self._new_id,
                metrics=metrics,
                ingest_metrics=IngestMetrics(metrics),
                shards=self.plan.shards,
            )

        await self._serve(role, broker, create)

    async def _serve(self, role: ProcessRole, broker: Broker, create: Callable[[], Service]) -> None:
        """Start a service; try again while a server is unavailable, as `sublet_platform.service` does."""
        while True:
            service = create()
            try:
                await service.start()
            except (BrokerUnavailable, StoreUnavailable):
                await service.stop()
                await asyncio.sleep(RESTART_DELAY_S)
            else:
                break

        async def stop() -> None:
            try:
                async with asyncio.timeout(STOP_TIMEOUT_S):
                    await service.stop()
            except TimeoutError:
                self.note(f"{role.process.name} did not stop in time")
            await broker.close()

        role.stop = stop

    async def _start_worker(self, role: ProcessRole) -> None:
        sublet = self._sublet(role)
        workflows = self.declare(sublet)
        plan = self.plan.workers[int(role.name.rpartition("-")[2])]
        known = [workflow for name, workflow in workflows.items() if name in HELPED or not plan.helper]
        worker = sublet.worker("pool", slots=plan.slots, durable_slots=plan.durable_slots, workflows=known)
        self.observers.joined(role.process, plan)
        await worker.aio_start()
        role.stop = worker.stop
