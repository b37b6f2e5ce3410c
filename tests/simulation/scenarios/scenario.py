"""A scenario: a small simulated system in which a script decides what fails, and exactly when.

There are two workers with one slot of each kind, one scheduler, one timer and one event-ingest. A script starts runs
and registers triggers for failures. A trigger fires when a certain message passes the broker, before its receiver takes
a step.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from datetime import timedelta
from random import Random
from typing import Any, Literal

from simulation.checkers import final_state
from simulation.checkers.history import Body
from simulation.faults.driver import Driver
from simulation.scenarios.plan import Fault, Plan, RunPlan, WorkerPlan
from simulation.simulation import WARM_UP_S, Simulation, simulate
from simulation.system.processes import Process, ProcessLoop
from simulation.system.programs import Bodies, Program
from simulation.system.simulated_system import ProcessRole, SimulatedSystem
from sublet import Sublet
from sublet_engine.run.state import Run, TaskRun
from sublet_platform.memory.cluster import Message, Subscription
from sublet_protocol import ids
from sublet_protocol.messages import RunRequest, decode_for_shard, decode_for_worker, decode_ticket
from support.virtual_time import EPOCH_S

TIMEOUT_S = 60.0
"""Execution timeout of tasks: longer than any failure lasts."""

STRICT_TIMEOUT_S = 12.0
"""Execution timeout of ``strict``."""

URGENT_S = 5.0
"""Schedule timeout of ``urgent`` and ``urgent_evictable``."""

AFTERMATH_S = 36.0
"""After this time the scheduler has noticed lost workers and has given up lost tickets."""

DURABLE = ("evictable", "resident", "urgent_evictable")

Script = Callable[["Scenario"], Coroutine[Any, Any, None]]
Act = Callable[[ProcessRole], None]


@dataclass(frozen=True)
class Trigger:
    """Fires ``then_s`` after the ``nth`` message of this type. Counted are messages about the run and tickets of its
    kind: ``sent`` by a worker (when they arrive at the broker), ``received`` or ``acked`` by a worker."""

    how: Literal["sent", "received", "acked"]
    what: type
    nth: int = 1
    then_s: float = 0.0


class TriggerWatcher:
    """Watches messages in addition to the observers, and fires triggers for the first run that the client requests."""

    def __init__(self, system: SimulatedSystem) -> None:
        self._system = system
        self._waiting: list[tuple[Trigger, Act]] = []
        self._counts: dict[tuple[str, type], int] = {}
        self.kind = ""
        self.run_id: str | None = None
        system.cluster.watcher = self

    def at(self, trigger: Trigger, act: Act) -> None:
        self._waiting.append((trigger, act))

    @property
    def pending(self) -> list[Trigger]:
        return [trigger for trigger, _ in self._waiting]

    def sent(self, sender: Process, message: Message) -> None:
        self._system.observers.sent(sender, message)
        if sender.role.startswith(("worker-", "client-")) and message.body.startswith(b'[{"t"'):
            for record in decode_for_shard(message.body):
                if isinstance(record, RunRequest) and self.run_id is None:
                    self.run_id = record.run_id
                self._passed("sent", sender, record)

    def received(self, receiver: Process, subscription: Subscription, tag: int, message: Message) -> None:
        self._system.observers.received(receiver, subscription, tag, message)
        if not receiver.role.startswith("worker-"):
            return
        if message.routing_key.startswith("sublet.pool."):
            self._passed_ticket("received", receiver, message)
        elif message.body.startswith(b'[{"t"'):
            for record in decode_for_worker(message.body):
                self._passed("received", receiver, record)

    def acked(self, sender: Process, ticket: Any) -> None:
        self._system.observers.acked(sender, ticket)
        self._passed_ticket("acked", sender, ticket)

    def _passed_ticket(self, how: str, process: Process, ticket: Any) -> None:
        if ticket.routing_key.endswith(f".{self.kind}"):
            self._passed(how, process, decode_ticket(ticket.body))

    def _passed(self, how: str, process: Process, record: Any) -> None:
        lease, kind = getattr(record, "lease", None), getattr(record, "kind", self.kind)
        if kind != self.kind or (lease is not None and ids.run_of(lease) != self.run_id):
            return
        count = self._counts[how, type(record)] = self._counts.get((how, type(record)), 0) + 1
        for entry in [entry for entry in self._waiting if entry[0].how == how and entry[0].what is type(record)]:
            if entry[0].nth == count:
                self._waiting.remove(entry)
                self._fire(process, *entry)

    def _fire(self, process: Process, trigger: Trigger, act: Act) -> None:
        """Schedule ``act`` now. The process schedules its reaction to the message later, so ``act`` comes first."""
        role, loop = self._system.roles[process.role], self._system.loop
        before, loop.process = loop.process, None
        if trigger.then_s:
            loop.call_later(trigger.then_s, act, role)
        else:
            loop.call_soon(act, role)
        loop.process = before


class ScenarioSystem(SimulatedSystem):
    def declare(self, sublet: Sublet) -> dict[str, Any]:
        """The workflows of scenarios, by name.

        ``task`` is ordinary. ``strict`` is too, and has a short execution timeout. ``evictable`` and ``resident`` are
        durable; the first is evicted while it waits, the second keeps its slot. ``urgent`` and ``urgent_evictable``
        have a short schedule timeout. ``mixed`` is a DAG of a durable task that waits and a task that fails.
        ``task``, ``evictable`` and ``resident`` have two retries, after 3 and 9 seconds."""
        client: Any = sublet
        workflows: dict[str, Any] = {}
        bodies = Bodies(self.history, workflows)
        options = {"input_validator": dict, "execution_timeout": timedelta(seconds=TIMEOUT_S)}
        patient = {**options, "retries": 2, "backoff_factor": 3.0}
        workflows["task"] = client.task(name="task", **patient)(bodies.ordinary)
        strict = {**options, "execution_timeout": timedelta(seconds=STRICT_TIMEOUT_S)}
        workflows["strict"] = client.task(name="strict", **strict)(bodies.ordinary)
        schedule_timeout = timedelta(seconds=URGENT_S)
        workflows["urgent"] = client.task(name="urgent", schedule_timeout=schedule_timeout, **options)(bodies.ordinary)
        workflows["urgent_evictable"] = client.durable_task(
            name="urgent_evictable", schedule_timeout=schedule_timeout, **options
        )(bodies.durable)
        workflows["evictable"] = client.durable_task(name="evictable", **patient)(bodies.durable)
        workflows["resident"] = client.durable_task(name="resident", eviction_policy=None, **patient)(bodies.durable)
        mixed = workflows["mixed"] = client.workflow(name="mixed", input_validator=dict)
        mixed.durable_task(name="waits")(bodies.fixed([["sleep", 6.0]], durable=True))
        mixed.task(name="fails")(bodies.fixed([["fail", 1]], durable=False))
        return workflows


@dataclass(frozen=True)
class ScenarioResult:
    """The end of a scenario. ``started_at``: when each body of the run started, in Unix seconds."""

    run: Run
    started_at: tuple[float, ...]

    @property
    def bodies(self) -> int:
        """How often the run's code was started."""
        return len(self.started_at)

    @property
    def task(self) -> TaskRun:
        (task,) = self.run.tasks
        return task


class Scenario(Simulation):
    """The simulation that a script controls. "The run" is the first that the script starts."""

    def __init__(
        self, loop: ProcessLoop, plan: Plan, verbose: bool, script: Script, remember: Callable[[ScenarioResult], None]
    ) -> None:
        super().__init__(loop, plan, verbose)
        self._script = script
        self._remember = remember
        self._loop = loop
        self._background: list[asyncio.Task[Any]] = []
        self.trigger_watcher: TriggerWatcher

    async def run(self) -> None:
        system = self.system = ScenarioSystem(self._plan, verbose=self._verbose)
        self.driver = Driver(system, Random(0))
        self.trigger_watcher = TriggerWatcher(system)
        await system.begin()
        await asyncio.sleep(WARM_UP_S)
        await self._script(self)
        for trigger in self.trigger_watcher.pending:
            system.report_violation(f"{trigger} did not fire")
        await self.wait_for_end()
        await asyncio.sleep(AFTERMATH_S)
        final_state.check(system)
        if any(not body.ended and not body.process.gone for body in system.history.bodies):
            system.report_violation("the code of an ended run still runs")
        # A reference to the scenario itself would keep its system in memory.
        self._remember(ScenarioResult(self.stored, tuple(EPOCH_S + body.started_s for body in self.bodies)))

    # --- for scripts --------------------------------------------------------------------------------------------

    def start(self, workflow: str, steps: Program) -> None:
        """Request a run."""
        if self.trigger_watcher.run_id is None and not self.trigger_watcher.kind:
            self.trigger_watcher.kind = "durable" if workflow in DURABLE else "task"
        self._begin(self.system.roles["client-0"], self._request(RunPlan(0.0, workflow, steps)))

    def at(self, trigger: Trigger, act: Act) -> None:
        self.trigger_watcher.at(trigger, act)

    def run_in_background(self, work: Coroutine[Any, Any, Any]) -> None:
        """Run something beside the script; the scenario waits until it has ended."""
        self._background.append(self._loop.create_task(work))

    def ask(self, work: Coroutine[Any, Any, Any]) -> None:
        """Run something as the client; the scenario waits until it has ended."""
        self._begin(self.system.roles["client-0"], work)
        self._background.append(self._tasks[-1])

    async def wait_for_end(self) -> None:
        """Wait until all runs and everything in the background have ended."""
        await self._until_all_ended()
        if self._background:
            _, unfinished = await asyncio.wait(self._background, timeout=300)
            if unfinished:
                self.system.report_violation(f"{len(unfinished)} background tasks do not end")
        for task in self._background:
            if task.done() and task.exception() is not None:
                self.system.report_violation(f"a background task failed: {task.exception()!r}")

    async def _flush(self) -> None:
        """Publish nothing: only the script publishes events."""

    # --- state --------------------------------------------------------------------------------------------------

    @property
    def stored(self) -> Run:
        return self.system.database.runs[self.trigger_watcher.run_id or ""]

    @property
    def task(self) -> TaskRun:
        (task,) = self.stored.tasks
        return task

    @property
    def bodies(self) -> list[Body]:
        """One body for each time that the run's code was started."""
        return [
            body for body in self.system.history.bodies if ids.run_of(body.task_run_id) == self.trigger_watcher.run_id
        ]


def run_scenario(script: Script, *, workers: int = 2, verbose: bool = False) -> ScenarioResult:
    """Run a script in a new simulated system, and assert that no check found a violation."""
    plan = Plan(
        seed=1,
        shards=1,
        schedulers=1,
        timers=1,
        ingests=1,
        workers=(WorkerPlan(1, 1),) * workers,
        latency_s=0.004,
        store_latency_s=0.004,
        skew_s={},
        dags=(),
        runs=(),
        events=(),
        lingers_s=0.0,
        faults=(Fault(0.0, "scripted", role="worker-0"),),
    )
    results: list[ScenarioResult] = []
    outcome = simulate(
        plan, verbose=verbose, make=lambda loop, plan, verbose: Scenario(loop, plan, verbose, script, results.append)
    )
    assert not outcome.violations, "\n".join([*outcome.violations, *outcome.story])
    return results[0]
