"""A stage: a small world in which a script says what goes wrong, and exactly when.

There are two workers with one slot of each kind, one scheduler, one timer and one event-ingest. A script starts runs,
and gives cues at which trouble begins: when a certain message passes the broker, before whoever gets it takes a step.
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
"""Active time that tasks are allowed: more than any trouble lasts."""

STRICT_TIMEOUT_S = 12.0
"""The same, of ``strict``."""

HASTE_S = 5.0
"""Schedule timeout of ``hasty`` and ``hasty_leaver``."""

AFTERMATH_S = 36.0
"""Then the workers that were lost are known to be lost, and tickets that were lost are forgotten."""

DURABLE = ("leaver", "stayer", "hasty_leaver")

Script = Callable[["Scenario"], Coroutine[Any, Any, None]]
Act = Callable[[ProcessRole], None]


@dataclass(frozen=True)
class Trigger:
    """The ``nth`` time that a record about the run, or a ticket of its kind, is ``sent`` by a worker and arrives at
    the broker, is ``received`` by a worker, or is ``acked`` by one; and ``then_s`` later."""

    how: Literal["sent", "received", "acked"]
    what: type
    nth: int = 1
    then_s: float = 0.0


class TriggerWatcher:
    """Looks at what passes, beside the observers, and gives cues for the first run that the client requests."""

    def __init__(self, world: SimulatedSystem) -> None:
        self._world = world
        self._waiting: list[tuple[Trigger, Act]] = []
        self._seen: dict[tuple[str, type], int] = {}
        self.kind = ""
        self.run_id: str | None = None
        world.cluster.watcher = self

    def at(self, cue: Trigger, act: Act) -> None:
        self._waiting.append((cue, act))

    @property
    def missed(self) -> list[Trigger]:
        return [cue for cue, _ in self._waiting]

    def sent(self, sender: Process, message: Message) -> None:
        self._world.observers.sent(sender, message)
        if sender.role.startswith(("worker-", "client-")) and message.body.startswith(b'[{"t"'):
            for record in decode_for_shard(message.body):
                if isinstance(record, RunRequest) and self.run_id is None:
                    self.run_id = record.run_id
                self._passed("sent", sender, record)

    def received(self, receiver: Process, subscription: Subscription, tag: int, message: Message) -> None:
        self._world.observers.received(receiver, subscription, tag, message)
        if not receiver.role.startswith("worker-"):
            return
        if message.routing_key.startswith("sublet.pool."):
            self._passed_ticket("received", receiver, message)
        elif message.body.startswith(b'[{"t"'):
            for record in decode_for_worker(message.body):
                self._passed("received", receiver, record)

    def acked(self, sender: Process, ticket: Any) -> None:
        self._world.observers.acked(sender, ticket)
        self._passed_ticket("acked", sender, ticket)

    def _passed_ticket(self, how: str, process: Process, ticket: Any) -> None:
        if ticket.routing_key.endswith(f".{self.kind}"):
            self._passed(how, process, decode_ticket(ticket.body))

    def _passed(self, how: str, process: Process, record: Any) -> None:
        lease, kind = getattr(record, "lease", None), getattr(record, "kind", self.kind)
        if kind != self.kind or (lease is not None and ids.run_of(lease) != self.run_id):
            return
        seen = self._seen[how, type(record)] = self._seen.get((how, type(record)), 0) + 1
        for entry in [entry for entry in self._waiting if entry[0].how == how and entry[0].what is type(record)]:
            if entry[0].nth == seen:
                self._waiting.remove(entry)
                self._prompt(process, *entry)

    def _prompt(self, process: Process, cue: Trigger, act: Act) -> None:
        """What the process does about it is scheduled later than this, and so happens after it."""
        role, loop = self._world.roles[process.role], self._world.loop
        before, loop.process = loop.process, None
        if cue.then_s:
            loop.call_later(cue.then_s, act, role)
        else:
            loop.call_soon(act, role)
        loop.process = before


class StageWorld(SimulatedSystem):
    def declare(self, sublet: Sublet) -> dict[str, Any]:
        """``task`` is ordinary, ``strict`` has little time, ``leaver`` is durable and leaves when it waits, ``stayer``
        stays. ``hasty`` and ``hasty_leaver`` must find a slot soon. ``mixed`` is a DAG of a durable task that waits and
        one that fails. A ``task``, ``leaver`` or ``stayer`` that fails is tried twice more, after 3 and 9 seconds."""
        made: Any = sublet
        workflows: dict[str, Any] = {}
        bodies = Bodies(self.history, workflows)
        options = {"input_validator": dict, "execution_timeout": timedelta(seconds=TIMEOUT_S)}
        patient = {**options, "retries": 2, "backoff_factor": 3.0}
        workflows["task"] = made.task(name="task", **patient)(bodies.ordinary)
        strict = {**options, "execution_timeout": timedelta(seconds=STRICT_TIMEOUT_S)}
        workflows["strict"] = made.task(name="strict", **strict)(bodies.ordinary)
        haste = timedelta(seconds=HASTE_S)
        workflows["hasty"] = made.task(name="hasty", schedule_timeout=haste, **options)(bodies.ordinary)
        workflows["hasty_leaver"] = made.durable_task(name="hasty_leaver", schedule_timeout=haste, **options)(
            bodies.durable
        )
        workflows["leaver"] = made.durable_task(name="leaver", **patient)(bodies.durable)
        workflows["stayer"] = made.durable_task(name="stayer", eviction_policy=None, **patient)(bodies.durable)
        mixed = workflows["mixed"] = made.workflow(name="mixed", input_validator=dict)
        mixed.durable_task(name="waits")(bodies.fixed([["sleep", 6.0]], durable=True))
        mixed.task(name="fails")(bodies.fixed([["fail", 1]], durable=False))
        return workflows


@dataclass(frozen=True)
class Seen:
    """What is left of a scene. ``began_at``: when each body of the run began, as the run's own times are given."""

    run: Run
    began_at: tuple[float, ...]

    @property
    def bodies(self) -> int:
        """How often the code of the run was begun."""
        return len(self.began_at)

    @property
    def task(self) -> TaskRun:
        (task,) = self.run.tasks
        return task


class Scenario(Simulation):
    """What a script has in hand. The ``run`` is the first that it starts."""

    def __init__(
        self, loop: ProcessLoop, plan: Plan, tell: bool, script: Script, remember: Callable[[Seen], None]
    ) -> None:
        super().__init__(loop, plan, tell)
        self._script = script
        self._remember = remember
        self._loop = loop
        self._troubles: list[asyncio.Task[Any]] = []
        self.prompter: TriggerWatcher

    async def run(self) -> None:
        world = self.world = StageWorld(self._plan, telling=self._tell)
        self.driver = Driver(world, Random(0))
        self.prompter = TriggerWatcher(world)
        await world.begin()
        await asyncio.sleep(WARM_UP_S)
        await self._script(self)
        for cue in self.prompter.missed:
            world.complain(f"it never came to {cue}")
        await self.all_over()
        await asyncio.sleep(AFTERMATH_S)
        final_state.check(world)
        if any(not body.ended and not body.process.gone for body in world.history.bodies):
            world.complain("code of a run that has ended goes on for ever")
        # Not the stage itself: it would keep its world.
        self._remember(Seen(self.stored, tuple(EPOCH_S + body.began_s for body in self.bodies)))

    # --- what a script does -------------------------------------------------------------------------------------

    def start(self, workflow: str, steps: Program) -> None:
        """Request a run."""
        if self.prompter.run_id is None and not self.prompter.kind:
            self.prompter.kind = "durable" if workflow in DURABLE else "task"
        self._begin(self.world.roles["client-0"], self._request(RunPlan(0.0, workflow, steps)))

    def at(self, cue: Trigger, act: Act) -> None:
        self.prompter.at(cue, act)

    def trouble(self, work: Coroutine[Any, Any, Any]) -> None:
        """What goes on for a while. The scene is not over before."""
        self._troubles.append(self._loop.create_task(work))

    def ask(self, work: Coroutine[Any, Any, Any]) -> None:
        """What the client does."""
        self._begin(self.world.roles["client-0"], work)
        self._troubles.append(self._tasks[-1])

    async def all_over(self) -> None:
        """All runs have ended, and so have all troubles."""
        await self._until_all_ended()
        if self._troubles:
            _, unfinished = await asyncio.wait(self._troubles, timeout=300)
            if unfinished:
                self.world.complain(f"{len(unfinished)} troubles do not end")
        for trouble in self._troubles:
            if trouble.done() and trouble.exception() is not None:
                self.world.complain(f"a trouble failed: {trouble.exception()!r}")

    async def _flush(self) -> None:
        """Who waits for an event gets it from the script, or never."""

    # --- what is seen -------------------------------------------------------------------------------------------

    @property
    def stored(self) -> Run:
        return self.world.database.runs[self.prompter.run_id or ""]

    @property
    def task(self) -> TaskRun:
        (task,) = self.stored.tasks
        return task

    @property
    def bodies(self) -> list[Body]:
        """Every time that the code of the run was begun."""
        return [body for body in self.world.history.bodies if ids.run_of(body.task_run_id) == self.prompter.run_id]


def play(script: Script, *, workers: int = 2, tell: bool = False) -> Seen:
    """Play it on a stage of its own; whatever must always hold is checked."""
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
    seen: list[Seen] = []
    outcome = simulate(plan, tell=tell, make=lambda loop, plan, tell: Scenario(loop, plan, tell, script, seen.append))
    assert not outcome.violations, "\n".join([*outcome.violations, *outcome.story])
    return seen[0]
