"""One simulation: build the system of a plan, run it with faults, heal it, wait for the end of all runs, and check."""

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

WARM_UP_S = 3.0
"""Workers register before the client requests runs."""

FLUSH_INTERVAL_S = 3.0
"""After the faults have been healed, every possible event is published this often, so that no wait stays open."""

PATIENCE_S = 600.0
"""All runs must end within this time after the faults have been healed."""

SETTLE_S = 200.0
"""Then tickets must be back in their queues, cancelled code must have stopped, and workers must be idle within this."""

SETTLE_POLL_S = 3.0
"""How often this is checked."""


@dataclass
class Outcome:
    """``violations``: empty if all checks passed. ``digest`` is always the same for the same plan."""

    seed: int
    violations: list[str]
    runs: int = 0
    faults: int = 0
    virtual_s: float = 0.0
    steps: int = 0
    anomalies: dict[str, int] = field(default_factory=dict)
    story: list[str] = field(default_factory=list)
    digest: int = 0


def simulate(plan: Plan, *, verbose: bool = False, make: Make | None = None) -> Outcome:
    """``verbose``: collect messages and log lines in the story. ``make``: builds another kind of simulation."""
    gc.disable()
    _keep_what_is_imported()
    hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
    warnings.simplefilter("ignore", RuntimeWarning)
    try:
        with _numbered_tasks(), tiny_limits() if plan.has_tiny_limits else contextlib.nullcontext():
            return _simulate(plan, verbose, make or Simulation)
    finally:
        # Unfinished coroutines are closed here, where their clean-up code cannot disturb the next simulation.
        gc.collect()
        sys.unraisablehook = hook
        gc.enable()


@contextlib.contextmanager
def _numbered_tasks() -> Iterator[None]:
    """asyncio keeps tasks in sets and cancels a group in the order of its set. By default this depends on addresses in
    memory, so the same plan could run differently. Hashes that count up make the order the same every time."""
    numbers = itertools.count()

    def number(task: Any) -> int:
        if not hasattr(task, "number"):
            task.number = next(numbers)
        return int(task.number)

    with patch.object(BranchTask, "__hash__", number):
        yield


@functools.cache
def _keep_what_is_imported() -> None:
    """Exclude imported modules from garbage collection, so that it need not scan them after each simulation."""
    gc.collect()
    gc.freeze()


def _simulate(plan: Plan, verbose: bool, make: Make) -> Outcome:
    loop = ProcessLoop()
    simulation = make(loop, plan, verbose)
    try:
        with _logs(simulation, loop, verbose):
            loop.set_exception_handler(simulation.failed_callback)
            try:
                loop.run_until_complete(simulation.run())
            except Endless:
                simulation.system.report_violation("too many steps: some code loops without waiting")
        return simulation.outcome()
    finally:
        loop.abandon()
        loop.close()


class Simulation:
    def __init__(self, loop: ProcessLoop, plan: Plan, verbose: bool) -> None:
        self._loop = loop
        self._plan = plan
        self._verbose = verbose
        self._tasks: list[asyncio.Task[None]] = []
        self.system: SimulatedSystem
        self.driver: Driver

    async def run(self) -> None:
        system = self.system = SimulatedSystem(self._plan, verbose=self._verbose)
        self.driver = Driver(system, Random(self._plan.seed * 7 + 4))
        await system.begin()
        await asyncio.sleep(WARM_UP_S)
        faults = self._loop.create_task(self.driver.run(self._plan.faults))
        client = system.roles["client-0"]
        for run in self._plan.runs:
            self._begin(client, self._request(run))
        for event in self._plan.events:
            self._begin(client, self._publish(event))
        await asyncio.sleep(LAST_WORK_S)
        await asyncio.wait([faults], timeout=HEALED_AT_S - LAST_WORK_S)
        await self._heal(faults)
        if await self._until_all_ended():
            await asyncio.sleep(self._plan.lingers_s)
            await self._until_nothing_leaks()
            final_state.check(system)

    def failed_callback(self, _: Any, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if "never retrieved" not in context["message"] or not isinstance(error, Exception):
            self.system.report_violation(f"{context['message']}: {error!r}")

    def outcome(self) -> Outcome:
        system = self.system
        return Outcome(
            seed=self._plan.seed,
            violations=list(system.violations),
            runs=len(system.database.runs),
            faults=self.driver.injected,
            virtual_s=self._loop.time(),
            steps=self._loop.steps,
            anomalies=system.anomalies,
            story=system.story,
            digest=digest_of(system),
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
                ref = await self.system.workflows[run.workflow].aio_run({"steps": run.steps}, wait_for_result=False)
        run_id = ref.workflow_run_id
        self.system.note(f"run {run_id} of {run.workflow}: {run.steps}")
        changes = [("cancel", at_s) for at_s in run.cancels_at_s] + [("replay", at_s) for at_s in run.replays_at_s]
        for what, at_s in changes:
            self._begin(self.system.roles["client-0"], self._change(run_id, what, at_s - run.at_s))
        while run_id not in self.system.history.results:
            with contextlib.suppress(TransportUnavailable):
                (result,) = await self.system.client._connection.results([run_id])
                outputs = {name: msgspec.json.decode(raw) for name, raw in result.outputs.items()}
                self.system.history.ended(run_id, str(result.status), outputs)

    async def _change(self, run_id: str, what: str, after_s: float) -> None:
        await asyncio.sleep(after_s)
        self.system.note(f"the client requests to {what} {run_id}")
        with contextlib.suppress(TransportUnavailable, ValueError):
            await getattr(self.system.client.runs, f"aio_{what}")(run_id)

    async def _publish(self, event: EventPlan) -> None:
        await asyncio.sleep(event.at_s)
        with contextlib.suppress(TransportUnavailable):
            await self.system.client.event.aio_push(event.key, event.payload, scope=event.scope)

    # --- the end ------------------------------------------------------------------------------------------------

    async def _heal(self, faults: asyncio.Task[None]) -> None:
        """End all faults, and start every process that is missing."""
        system = self.system
        for role in system.roles.values():
            role.process.steps_left = None
        await asyncio.wait([faults], timeout=60)
        if not faults.done():
            faults.cancel()
        elif faults.exception() is not None:
            raise RuntimeError(f"the driver failed: {faults.exception()!r}") from faults.exception()
        system.database.conditions.clear()
        if not system.cluster.running:
            system.cluster.start()
        for role in list(system.roles.values()):
            self._loop.thaw(role.process)
        for name in self._plan.roles:
            await system.start(name)
        system.note("all faults are healed")

    async def _until_all_ended(self) -> bool:
        """Wait until all runs have ended and all calls of the client have returned; False if some have not."""
        system = self.system
        until_s = self._loop.time() + PATIENCE_S
        while self._loop.time() < until_s and not system.violations:
            if all(run.terminal for run in system.database.runs.values()) and all(task.done() for task in self._tasks):
                return True
            await self._flush()
            await asyncio.sleep(FLUSH_INTERVAL_S)
        if not system.violations:
            for run in system.database.runs.values():
                if not run.terminal:
                    states = [(task.name, task.status) for task in run.tasks]
                    system.report_violation(f"run {run.id} of {run.workflow} does not end: {states}")
            waiting = sum(not task.done() for task in self._tasks)
            system.report_violation(f"{waiting} client calls do not return")
        return False

    async def _until_nothing_leaks(self) -> None:
        until_s = self._loop.time() + SETTLE_S
        while self._loop.time() < until_s:
            await asyncio.sleep(SETTLE_POLL_S)
            if not any(final_state.leaks(self.system)):
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
        name = self._loop.process.name if self._loop.process is not None else "outside"
        self._simulation.system.note(f"[{name}] {record.getMessage()}")
        if record.exc_info and record.exc_info[1] is not None:
            self._simulation.system.note(self.format(record))


@contextlib.contextmanager
def _logs(simulation: Simulation, loop: ProcessLoop, verbose: bool) -> Iterator[None]:
    """Add the system's log lines to the story if ``verbose``; otherwise drop them."""
    root = logging.getLogger()
    handlers, root.handlers[:] = root.handlers[:], []
    level = root.level
    if verbose:
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
