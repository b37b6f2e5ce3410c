"""One simulation: build the world of a plan, let it work and fail, heal it, wait for the end, and check."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import itertools
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from random import Random
from typing import Any
from unittest.mock import patch

import msgspec

from simulation.checkers import final_state
from simulation.checkers.digest import digest_of
from simulation.faults.driver import HEALED_AT_S, Driver
from simulation.faults.tiny_limits import tiny_limits
from simulation.scenarios.plan import EventPlan, Plan, RunPlan
from simulation.scenarios.workloads import EVENT_KEYS, LAST_WORK_S, VALUES
from simulation.system.processes import Endless, ProcessLoop
from simulation.system.simulated_system import SimulatedSystem
from sublet._durable.task_tree import BranchTask
from sublet._errors import TransportUnavailable
from sublet_scheduler.scheduler import _scheduler_metrics

WARM_UP_S = 3.0
"""Workers introduce themselves before anybody asks for runs."""

FLUSH_INTERVAL_S = 3.0
"""After the healing every possible event is published this often, so that whoever waits for one gets it."""

PATIENCE_S = 600.0
"""All runs must have ended this long after the healing."""

SETTLE_S = 200.0
"""At most as long after that tickets have come back, what was cancelled is gone, and workers are idle."""

SETTLE_LOOK_S = 3.0
"""How often it is looked whether this is so."""


@dataclass
class Outcome:
    """``violations``: empty if all went well. ``digest`` is the same for the same plan, always."""

    seed: int
    violations: list[str]
    runs: int = 0
    faults: int = 0
    virtual_s: float = 0.0
    steps: int = 0
    anomalies: dict[str, int] = field(default_factory=dict)
    story: list[str] = field(default_factory=list)
    digest: int = 0


def simulate(plan: Plan, *, tell: bool = False, make: Make | None = None) -> Outcome:
    """``tell``: also collect what the system itself logs into the story. ``make``: another kind of simulation."""
    gc.disable()
    _keep_what_is_imported()
    hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
    warnings.simplefilter("ignore", RuntimeWarning)
    try:
        with _numbered_tasks(), tiny_limits() if plan.narrow else contextlib.nullcontext():
            return _simulate(plan, tell, make or Simulation)
    finally:
        _scheduler_metrics.cache_clear()  # it would keep every world
        # Coroutines that were never finished are closed here, where what they still try harms nobody.
        gc.collect()
        sys.unraisablehook = hook
        gc.enable()


@contextlib.contextmanager
def _numbered_tasks() -> Iterator[None]:
    """asyncio keeps tasks in sets, and cancels those of a group in the order in which a set gives them: by address, if
    nothing else is said. Then the same plan would not always go the same way."""
    numbers = itertools.count()

    def number(task: Any) -> int:
        if not hasattr(task, "number"):
            task.number = next(numbers)
        return int(task.number)

    with patch.object(BranchTask, "__hash__", number):
        yield


@functools.cache
def _keep_what_is_imported() -> None:
    """Out of the collector's sight: it need not go through all modules after each simulation."""
    gc.collect()
    gc.freeze()


def _simulate(plan: Plan, tell: bool, make: Make) -> Outcome:
    loop = ProcessLoop()
    simulation = make(loop, plan, tell)
    try:
        with _logs(simulation, loop, tell):
            loop.set_exception_handler(simulation.failed_callback)
            try:
                loop.run_until_complete(simulation.run())
            except Endless:
                simulation.world.complain("everybody goes round in circles")
        return simulation.outcome()
    finally:
        loop.abandon()
        loop.close()


class Simulation:
    def __init__(self, loop: ProcessLoop, plan: Plan, tell: bool) -> None:
        self._loop = loop
        self._plan = plan
        self._tell = tell
        self._tasks: list[asyncio.Task[None]] = []
        self.world: SimulatedSystem
        self.driver: Driver

    async def run(self) -> None:
        world = self.world = SimulatedSystem(self._plan, telling=self._tell)
        self.driver = Driver(world, Random(self._plan.seed * 7 + 4))
        await world.begin()
        await asyncio.sleep(WARM_UP_S)
        faults = self._loop.create_task(self.driver.run(self._plan.faults))
        client = world.roles["client-0"]
        for run in self._plan.runs:
            self._begin(client, self._request(run))
        for event in self._plan.events:
            self._begin(client, self._publish(event))
        await asyncio.sleep(LAST_WORK_S)
        await asyncio.wait([faults], timeout=HEALED_AT_S - LAST_WORK_S)
        await self._heal(faults)
        if await self._until_all_ended():
            await asyncio.sleep(self._plan.lingers_s)
            await self._until_all_is_quiet()
            final_state.check(world)

    def failed_callback(self, _: Any, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if "never retrieved" not in context["message"] or not isinstance(error, Exception):
            self.world.complain(f"{context['message']}: {error!r}")

    def outcome(self) -> Outcome:
        world = self.world
        return Outcome(
            seed=self._plan.seed,
            violations=list(world.violations),
            runs=len(world.database.runs),
            faults=self.driver.injected,
            virtual_s=self._loop.time(),
            steps=self._loop.steps,
            anomalies=world.anomalies,
            story=world.story,
            digest=digest_of(world),
        )

    # --- the client ---------------------------------------------------------------------------------------------

    def _begin(self, role: Any, work: Any) -> None:
        before, self._loop.process = self._loop.process, role.process
        self._tasks.append(self._loop.create_task(work))
        self._loop.process = before

    async def _request(self, run: RunPlan) -> None:
        await asyncio.sleep(run.at_s)
        ref = None
        while ref is None:
            with contextlib.suppress(TransportUnavailable):
                ref = await self.world.workflows[run.workflow].aio_run({"steps": run.steps}, wait_for_result=False)
        run_id = ref.workflow_run_id
        self.world.note(f"run {run_id} of {run.workflow}: {run.steps}")
        changes = [("cancel", at_s) for at_s in run.cancels_at_s] + [("replay", at_s) for at_s in run.replays_at_s]
        for what, at_s in changes:
            self._begin(self.world.roles["client-0"], self._change(run_id, what, at_s - run.at_s))
        while run_id not in self.world.history.results:
            with contextlib.suppress(TransportUnavailable):
                (result,) = await self.world.client._connection.results([run_id])
                outputs = {name: msgspec.json.decode(raw) for name, raw in result.outputs.items()}
                self.world.history.ended(run_id, str(result.status), outputs)

    async def _change(self, run_id: str, what: str, after_s: float) -> None:
        await asyncio.sleep(after_s)
        self.world.note(f"the client asks to {what} {run_id}")
        with contextlib.suppress(TransportUnavailable, ValueError):
            await getattr(self.world.client.runs, f"aio_{what}")(run_id)

    async def _publish(self, event: EventPlan) -> None:
        await asyncio.sleep(event.at_s)
        with contextlib.suppress(TransportUnavailable):
            await self.world.client.event.aio_push(event.key, event.payload, scope=event.scope)

    # --- the end ------------------------------------------------------------------------------------------------

    async def _heal(self, faults: asyncio.Task[None]) -> None:
        """No more faults, and everybody is there."""
        world = self.world
        for role in world.roles.values():
            role.process.steps_left = None
        await asyncio.wait([faults], timeout=60)
        if not faults.done():
            faults.cancel()
        elif faults.exception() is not None:
            raise RuntimeError(f"the driver failed: {faults.exception()!r}") from faults.exception()
        world.database.conditions.clear()
        if not world.cluster.running:
            world.cluster.start()
        for role in list(world.roles.values()):
            self._loop.thaw(role.process)
        for name in self._plan.roles:
            await world.start(name)
        world.note("all is healed")

    async def _until_all_ended(self) -> bool:
        """False: some have not."""
        world = self.world
        until_s = self._loop.time() + PATIENCE_S
        while self._loop.time() < until_s and not world.violations:
            if all(run.terminal for run in world.database.runs.values()) and all(task.done() for task in self._tasks):
                return True
            await self._flush()
            await asyncio.sleep(FLUSH_INTERVAL_S)
        if not world.violations:
            for run in world.database.runs.values():
                if not run.terminal:
                    states = [(task.name, task.status) for task in run.tasks]
                    world.complain(f"run {run.id} of {run.workflow} does not end: {states}")
            waiting = sum(not task.done() for task in self._tasks)
            world.complain(f"{waiting} calls of the client do not return")
        return False

    async def _until_all_is_quiet(self) -> None:
        until_s = self._loop.time() + SETTLE_S
        while self._loop.time() < until_s:
            await asyncio.sleep(SETTLE_LOOK_S)
            if not any(final_state.what_is_left(self.world)):
                return

    async def _flush(self) -> None:
        for key in EVENT_KEYS:
            for n in range(VALUES):
                await self._publish(EventPlan(0.0, key, {"n": n, "flush": True}, "shop"))


Make = Callable[[ProcessLoop, Plan, bool], Simulation]


class _StoryHandler(logging.Handler):
    def __init__(self, simulation: Simulation, loop: ProcessLoop) -> None:
        super().__init__()
        self._simulation, self._loop = simulation, loop

    def emit(self, record: logging.LogRecord) -> None:
        who = self._loop.process.name if self._loop.process is not None else "outside"
        self._simulation.world.note(f"[{who}] {record.getMessage()}")
        if record.exc_info and record.exc_info[1] is not None:
            self._simulation.world.note(self.format(record))


@contextlib.contextmanager
def _logs(simulation: Simulation, loop: ProcessLoop, tell: bool) -> Iterator[None]:
    """What the system logs goes into the story, or nowhere."""
    root = logging.getLogger()
    handlers, root.handlers[:] = root.handlers[:], []
    level = root.level
    if tell:
        root.addHandler(_StoryHandler(simulation, loop))
        root.setLevel(logging.INFO)
    else:
        logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
        root.handlers[:] = handlers
        root.setLevel(level)
