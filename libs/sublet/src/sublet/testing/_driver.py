"""Drives the simulated system of a test: it runs while the test waits for it, and is paused otherwise.

Test and system run in one thread. Whenever the event loop of the test is idle, the system runs everything that can run.
While code of the test waits for something in the system (a result, the end of a skip), the virtual time jumps from each
due timer to the next.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections.abc import Callable, Coroutine
from contextvars import Context
from typing import Any, TypeVar

from sublet._errors import SubletError
from sublet.testing._loop import WorldLoop

T = TypeVar("T")

JUMPS_AT_ONCE = 200
"""Jumps in a row before the event loop of the test gets control, for its sockets and timeouts."""

STUCK_S = 1.0
"""Real seconds that the test has for work outside the system when nothing is due in the system."""

TEST_ROUNDS = 10
"""Rounds that the event loop of the test gets after each result, if it does not show whether it is busy."""


class NothingWillHappen(SubletError):
    """The test waits for something that will never happen, however much time passes. The text says why."""


class Driver:
    """The `Loop` of a client that is redirected to the simulated system.

    Args:
        loop: the event loop of the system.
        next_jump: returns the virtual time of the next due timer; None if nothing will ever be due.
        explain: returns a text that says why runs have not ended.
    """

    def __init__(self, loop: WorldLoop, next_jump: Callable[[], float | None], explain: Callable[[], str]) -> None:
        self._loop = loop
        self._test_loop = asyncio.get_running_loop()
        self._thread = threading.get_ident()
        self._next_jump = next_jump
        self._explain = explain
        self._waiting: dict[asyncio.Task[Any], asyncio.Future[Any]] = {}
        self._pumping: asyncio.Handle | None = None
        self._stuck: asyncio.TimerHandle | None = None
        self._test_rounds = 0
        loop.wake = self._wake

    # --- for the test -------------------------------------------------------------------------------------------

    async def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine in the system."""
        if asyncio.get_running_loop() is self._loop:
            return await work
        outcome: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        task = self._loop.create_task(work)
        self._waiting[task] = outcome
        task.add_done_callback(self._ended)
        self._pump_soon()
        try:
            return await outcome
        finally:
            self._waiting.pop(task, None)
            task.cancel()

    def run_sync(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine in the system, and block the calling thread.

        The thread of the test then drives the system itself; threads of sync tasks wait for it.
        """
        if threading.get_ident() != self._thread:
            return self._run_for_thread(work)
        if self._loop.turning:
            work.close()
            raise RuntimeError("async code cannot block: use the aio_… method")
        return self._run_blocking(work)

    def stop(self) -> None:
        """Does nothing: the loop ends with its environment."""

    def close(self) -> None:
        """Pause the system for good."""
        self._loop.wake = lambda: None
        for handle in (self._pumping, self._stuck):
            if handle is not None:
                handle.cancel()

    def _ended(self, task: asyncio.Task[Any]) -> None:
        outcome = self._waiting.pop(task, None)
        if outcome is None or outcome.done():
            if not task.cancelled():
                task.exception()
        elif task.cancelled():
            outcome.cancel()
        elif (error := task.exception()) is not None:
            outcome.set_exception(error)
        else:
            outcome.set_result(task.result())
        self._test_rounds = TEST_ROUNDS

    def _run_blocking(self, work: Coroutine[Any, Any, T]) -> T:
        task = self._loop.create_task(work)
        self._loop.turn()
        while not task.done():
            if self._loop.busy_threads:
                self._loop.wait_for_thread()
            elif (when := self._next_jump()) is None:
                task.cancel()
                raise NothingWillHappen(self._explain())
            else:
                self._loop.jump_to(when)
            self._loop.turn()
        return task.result()

    def _run_for_thread(self, work: Coroutine[Any, Any, T]) -> T:
        outcome: concurrent.futures.Future[T] = concurrent.futures.Future()

        def end(task: asyncio.Task[T]) -> None:
            self._loop.busy_threads += 1
            if task.cancelled():
                outcome.cancel()
            elif (error := task.exception()) is not None:
                outcome.set_exception(error)
            else:
                outcome.set_result(task.result())

        def begin() -> None:
            self._loop.busy_threads -= 1
            self._loop.create_task(work).add_done_callback(end)

        self._loop.call_soon_threadsafe(begin)
        return outcome.result()

    # --- pumping ------------------------------------------------------------------------------------------------

    def _wake(self) -> None:
        if threading.get_ident() == self._thread:
            self._pump_soon()
        else:
            self._test_loop.call_soon_threadsafe(self._pump_soon, context=Context())

    def _pump_soon(self) -> None:
        if self._pumping is None:
            self._pumping = self._test_loop.call_soon(self._pump, context=Context())

    def _pump(self) -> None:
        self._pumping = None
        for _ in range(JUMPS_AT_ONCE):
            self._loop.turn()
            if not self._waiting:
                return
            if self._test_is_busy():
                break
            if self._loop.busy_threads:
                return
            when = self._next_jump()
            if when is None:
                self._watch_if_stuck()
                return
            self._not_stuck()
            self._loop.jump_to(when)
        self._pump_soon()

    def _test_is_busy(self) -> bool:
        """Code of the test runs first, because it may be about to send something to the system."""
        ready = getattr(self._test_loop, "_ready", None)
        if ready is not None:
            return bool(ready)
        self._test_rounds -= 1
        return self._test_rounds >= 0

    # --- nothing is due ------------------------------------------------------------------------------------

    def _watch_if_stuck(self) -> None:
        self._not_stuck()
        self._stuck = self._test_loop.call_later(STUCK_S, self._give_up, context=Context())

    def _not_stuck(self) -> None:
        if self._stuck is not None:
            self._stuck.cancel()
            self._stuck = None

    def _give_up(self) -> None:
        self._stuck = None
        for task, outcome in list(self._waiting.items()):
            if not outcome.done():
                outcome.set_exception(NothingWillHappen(self._explain()))
            task.cancel()
