"""An event loop with virtual time that runs in the thread of another loop, and only on request.

Its callbacks belong to simulated processes. A killed process runs no further callback, not even the clean-up that
follows from cancelling its tasks.
"""

from __future__ import annotations

import asyncio
import heapq
import math
import selectors
from asyncio import tasks as asyncio_tasks
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from contextlib import contextmanager
from contextvars import Context
from typing import Any
from weakref import WeakKeyDictionary

from sublet_platform.memory.cluster import Pipe

ROUNDS_MAX = 10_000
"""Rounds of the loop in a row that had something to run. After that time may pass, because code may poll without a
pause."""


class Process:
    """A simulated process that can be killed. ``tasks`` keeps references to its unfinished tasks after that."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.gone = False
        self.tasks: list[asyncio.Task[Any]] = []


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
    loop: WorldLoop = step._loop
    if step.process is None or not step.process.gone:
        before, loop.process = loop.process, step.process
        run()  # does not raise: asyncio hands errors to the loop's exception handler
        loop.process = before


class _RestingSelector(selectors.DefaultSelector):
    """Never waits: it calls ``on_rest`` when there is nothing to do."""

    def __init__(self, on_rest: Callable[[], None]) -> None:
        super().__init__()
        self._on_rest = on_rest
        self.rounds = 0

    def select(self, timeout: float | None = None) -> Any:
        self.rounds += 1
        if timeout is None or timeout > 0 or self.rounds > ROUNDS_MAX:
            self._on_rest()
        return super().select(0)


class WorldLoop(asyncio.SelectorEventLoop):
    """The event loop of the simulated system.

    Attributes:
        process: the process of the callback that runs now; None for services, which cannot be killed.
        turning: True while the loop runs.
        busy_threads: number of threads that run sync tasks and do not wait for this loop.
        wake: called from any thread when there is something to do while the loop does not run.
    """

    def __init__(self) -> None:
        self._elapsed_s = 0.0
        self._owners: WeakKeyDictionary[asyncio.Task[Any], Process | None] = WeakKeyDictionary()
        self._resting_selector = _RestingSelector(self.stop)
        self.process: Process | None = None
        self.turning = False
        self.busy_threads = 0
        self.wake: Callable[[], None] = lambda: None
        super().__init__(self._resting_selector)

    # --- turning ------------------------------------------------------------------------------------------------

    def turn(self) -> None:
        """Run everything that can run without time passing. Another loop in this thread is paused meanwhile."""
        self._resting_selector.rounds = 0
        self.turning = True
        try:
            with _outer_loop_aside():
                self.run_forever()
                while self._ready and self._resting_selector.rounds <= ROUNDS_MAX:  # type: ignore[attr-defined]
                    self.run_forever()  # a thread added a callback just as the loop had become idle
        finally:
            self.turning = False

    def wait_for_thread(self) -> None:
        """Block until a thread adds a callback."""
        super(_RestingSelector, self._resting_selector).select(None)

    def time(self) -> float:
        return self._elapsed_s

    def jump_to(self, when: float) -> None:
        """Set the virtual time to ``when``."""
        # Slightly more, because a rounding error could make a timer seem not due yet.
        self._elapsed_s = max(self._elapsed_s, math.nextafter(when, math.inf))

    @property
    def timers(self) -> list[asyncio.TimerHandle]:
        """Scheduled timers. The first one is due next; the others are in no order."""
        scheduled: list[asyncio.TimerHandle] = self._scheduled  # type: ignore[attr-defined]
        return scheduled

    # --- processes ----------------------------------------------------------------------------------------------

    @contextmanager
    def acting_as(self, process: Process | None) -> Iterator[None]:
        """Callbacks that are scheduled in this block belong to ``process``."""
        before, self.process = self.process, process
        try:
            yield
        finally:
            self.process = before

    def kill(self, process: Process) -> None:
        """Make a process run no further callback."""
        process.gone = True
        process.tasks = [task for task in asyncio.all_tasks(self) if self._owners.get(task) is process]

    def owner_of(self, timer: asyncio.TimerHandle) -> Process | None:
        return timer.process if isinstance(timer, _TimedStep) else None

    def _owner(self, callback: Any) -> Process | None:
        target = getattr(callback, "__self__", None)
        if isinstance(target, asyncio.Task):
            return self._owners.setdefault(target, self.process)
        if isinstance(target, Pipe | WorldLoop):
            return None
        return self.process

    def _call_soon(self, callback: Any, args: Any, context: Context | None) -> asyncio.Handle:
        step = _Step(callback, args, self, context)
        step.process = self._owner(callback)
        self._ready.append(step)  # type: ignore[attr-defined]
        if not self.turning:
            self.wake()
        return step

    def call_soon_threadsafe(self, callback: Any, *args: Any, context: Context | None = None) -> asyncio.Handle:  # type: ignore[override]
        step = _Step(callback, args, self, context)
        step.process = None
        self._ready.append(step)  # type: ignore[attr-defined]
        self._write_to_self()  # type: ignore[attr-defined]
        self.wake()
        return step

    def call_at(  # type: ignore[override]
        self, when: float, callback: Any, *args: Any, context: Context | None = None
    ) -> asyncio.TimerHandle:
        step = _TimedStep(when, callback, args, self, context)
        step.process = self._owner(callback)
        heapq.heappush(self._scheduled, step)  # type: ignore[attr-defined]
        step._scheduled = True  # type: ignore[attr-defined]
        return step

    # --- threads ------------------------------------------------------------------------------------------------

    def run_in_executor(  # type: ignore[override]
        self, executor: Executor | None, func: Callable[..., Any], *args: Any
    ) -> asyncio.Future[Any]:
        self.busy_threads += 1
        future = super().run_in_executor(executor, func, *args)
        future.add_done_callback(self._thread_rests, context=Context())
        return future

    def _thread_rests(self, _: object) -> None:
        self.busy_threads -= 1


@contextmanager
def _outer_loop_aside() -> Iterator[None]:
    """Make asyncio believe that no loop runs in this thread."""
    loop = asyncio._get_running_loop()
    task = asyncio.current_task(loop) if loop is not None else None
    if task is not None:
        asyncio_tasks._leave_task(loop, task)  # type: ignore[arg-type]
    asyncio._set_running_loop(None)
    try:
        yield
    finally:
        asyncio._set_running_loop(loop)
        if task is not None:
            asyncio_tasks._enter_task(loop, task)  # type: ignore[arg-type]
