"""Processes in one event loop, each of which can be killed or frozen between any two of its steps.

A step is one callback of the loop. What a process schedules, and what resumes its tasks, belongs to it; what is under
way between processes (a message, a confirm) belongs to nobody. So a process that is killed takes no further step, not
even the clean-up that cancelling its tasks would run, and one that is frozen takes its steps later.
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
"""Virtual time that a step takes. If it took none, code that waits for "a little later" could go round for ever."""


STEPS_MAX = 150_000
"""Far more than any simulation takes: something goes round in circles."""


class Endless(Exception):
    """`STEPS_MAX` steps were taken, and there is no end."""


class Process:
    """``role``: the role that it plays, such as ``worker-1``; ``name`` also says in which of its lives. ``clock`` is
    the one that it goes by.

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
        process.deferred_steps.append(lambda: loop.put_back(step))


class ProcessLoop(VirtualTimeLoop):
    """``process``: whose step is being taken; None for the world outside. ``steps`` counts them all."""

    def __init__(self) -> None:
        self.process: Process | None = None
        self.steps = 0
        self.over = False
        self._owners: dict[asyncio.Task[Any], Process | None] = {}
        super().__init__()

    # --- for the world ------------------------------------------------------------------------------------------

    def run_as(self, process: Process, work: Callable[..., None], *args: Any) -> None:
        """Let a process take a step now (or when it thaws)."""
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
        for put_back in deferred_steps:
            put_back()

    def put_back(self, step: asyncio.Handle) -> None:
        self._ready.append(step)  # type: ignore[attr-defined]

    def abandon(self) -> None:
        """Nothing is ever run again. What unfinished coroutines try when they are collected comes to nothing."""
        self.over = True
        self._ready.clear()  # type: ignore[attr-defined]
        self._scheduled.clear()  # type: ignore[attr-defined]

    def call_exception_handler(self, context: Any) -> None:
        if not self.over:
            super().call_exception_handler(context)

    def _check_closed(self) -> None:
        if not self.over:
            super()._check_closed()  # type: ignore[misc]

    # --- whose step it is ---------------------------------------------------------------------------------------

    def _owner(self, callback: Any, context: Context | None) -> tuple[Process | None, Context | None]:
        target = getattr(callback, "__self__", None)
        if isinstance(target, asyncio.Task):
            # Kept here, so that the tasks of a dead process are not collected, which would run their clean-up.
            return self._owners.setdefault(target, self.process), context
        if isinstance(target, Pipe):
            return None, Context()
        return self.process, context

    def _call_soon(self, callback: Any, args: Any, context: Context | None) -> asyncio.Handle:
        process, context = self._owner(callback, context)
        step = _Step(callback, args, self, context)
        step.process = process
        if not self.over:
            self._ready.append(step)  # type: ignore[attr-defined]
        return step

    def call_at(self, when: float, callback: Any, *args: Any, context: Context | None = None) -> asyncio.TimerHandle:  # type: ignore[override]
        process, context = self._owner(callback, context)
        step = _TimedStep(when, callback, args, self, context)
        step.process = process
        if not self.over:
            heapq.heappush(self._scheduled, step)  # type: ignore[attr-defined]
            step._scheduled = True  # type: ignore[attr-defined]
        return step
