"""Processes in one event loop, each of which can be killed or frozen between any two of its steps.

A step is one callback of the loop. Callbacks that a process schedules, or that resume its tasks, belong to it. A
message or confirm in transit belongs to no process. A killed process takes no further step, not even the clean-up that
cancelling its tasks would run. A frozen process takes its steps after it has thawed.
"""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Callable
from contextvars import Context
from typing import Any

from sublet_platform.memory.cluster import Pipe
from support.virtual_time import VirtualClock, VirtualTimeLoop

STEP_S = 1e-6
"""Virtual time that a step takes. If a step took none, code that waits for a later time could loop without end."""


STEPS_MAX = 150_000
"""Far more than any simulation needs: with more steps, some code loops without waiting."""


class Endless(Exception):
    """The simulation took more than `STEPS_MAX` steps."""


class Process:
    """``role``: such as ``worker-1``. ``name``: the role and a number that is new after each restart. ``clock``: the
    clock that the process reads.

    When ``steps_left`` more steps have been taken, ``at_last_step`` is called before the next one.
    """

    def __init__(self, name: str, role: str, skew_s: float = 0.0) -> None:
        self.name = name
        self.role = role
        self.clock = VirtualClock(skew_s)
        self.gone = False
        self.frozen = False
        self.steps_left: int | None = None
        self.at_last_step: Callable[[], None] = lambda: None
        self.deferred_steps: list[Callable[[], None]] = []

    def may_step(self) -> bool:
        if self.steps_left is not None and not self.gone:
            self.steps_left -= 1
            if self.steps_left <= 0:
                self.steps_left = None
                self.at_last_step()
        return not self.gone and not self.frozen

    def __repr__(self) -> str:
        return f"<Process {self.name}>"


class _Step(asyncio.Handle):
    __slots__ = ("process",)

    process: Process | None

    def _run(self) -> None:
        _take(self, super()._run)


class _TimedStep(asyncio.TimerHandle):
    __slots__ = ("process",)

    process: Process | None

    def _run(self) -> None:
        _take(self, super()._run)


def _take(step: Any, run: Callable[[], None]) -> None:
    loop: ProcessLoop = step._loop
    loop.steps += 1
    if loop.steps > STEPS_MAX:
        raise Endless
    loop._elapsed_s += STEP_S
    process = step.process
    if process is None or process.may_step():
        loop.process = process
        run()
        loop.process = None
    elif not process.gone:
        process.deferred_steps.append(lambda: loop.reschedule(step))


class ProcessLoop(VirtualTimeLoop):
    """``process``: the process that takes the current step; None outside of all processes. ``steps``: the count of all
    steps."""

    def __init__(self) -> None:
        self.process: Process | None = None
        self.steps = 0
        self.abandoned = False
        self._owners: dict[asyncio.Task[Any], Process | None] = {}
        super().__init__()

    # --- for the system ------------------------------------------------------------------------------------------

    def run_as(self, process: Process, work: Callable[..., None], *args: Any) -> None:
        """Run a step of a process now, or when it thaws."""
        if process.may_step():
            before, self.process = self.process, process
            try:
                work(*args)
            finally:
                self.process = before
        elif not process.gone:
            process.deferred_steps.append(lambda: self.run_as(process, work, *args))

    def thaw(self, process: Process) -> None:
        process.frozen = False
        deferred_steps, process.deferred_steps = process.deferred_steps, []
        for reschedule in deferred_steps:
            reschedule()

    def reschedule(self, step: asyncio.Handle) -> None:
        self._ready.append(step)  # type: ignore[attr-defined]

    def abandon(self) -> None:
        """Run nothing any more. Whatever unfinished coroutines try when they are collected has no effect."""
        self.abandoned = True
        self._ready.clear()  # type: ignore[attr-defined]
        self._scheduled.clear()  # type: ignore[attr-defined]

    def call_exception_handler(self, context: Any) -> None:
        if not self.abandoned:
            super().call_exception_handler(context)

    def _check_closed(self) -> None:
        if not self.abandoned:
            super()._check_closed()  # type: ignore[misc]

    # --- owners of steps ----------------------------------------------------------------------------------------

    def _owner(self, callback: Any, context: Context | None) -> tuple[Process | None, Context | None]:
        target = getattr(callback, "__self__", None)
        if isinstance(target, asyncio.Task):
            # References keep the tasks of a dead process from being collected, which would run their clean-up code.
            return self._owners.setdefault(target, self.process), context
        if isinstance(target, Pipe):
            return None, Context()
        return self.process, context

    def _call_soon(self, callback: Any, args: Any, context: Context | None) -> asyncio.Handle:
        process, context = self._owner(callback, context)
        step = _Step(callback, args, self, context)
        step.process = process
        if not self.abandoned:
            self._ready.append(step)  # type: ignore[attr-defined]
        return step

    def call_at(self, when: float, callback: Any, *args: Any, context: Context | None = None) -> asyncio.TimerHandle:  # type: ignore[override]
        process, context = self._owner(callback, context)
        step = _TimedStep(when, callback, args, self, context)
        step.process = process
        if not self.abandoned:
            heapq.heappush(self._scheduled, step)  # type: ignore[attr-defined]
            step._scheduled = True  # type: ignore[attr-defined]
        return step
