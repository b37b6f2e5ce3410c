"""The event loop of a client's connection: one in a background thread, or that of the caller."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import threading
from collections.abc import Callable, Coroutine
from typing import Any, Protocol, TypeVar

T = TypeVar("T")

THREAD_END_MAX_S = 5.0
"""Seconds that `BackgroundLoop.stop` waits for its thread. A hanging thread must not block the program for longer."""

CLOSE_AT_EXIT_MAX_S = 2.0
"""Seconds that the end of a program waits until the connection is closed. Without a close RabbitMQ notices it too."""


class Loop(Protocol):
    async def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Await a coroutine, on any event loop. Cancelling the caller cancels the coroutine."""

    def run_sync(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine, and block this thread until it has ended."""

    def stop(self) -> None: ...


class BackgroundLoop:
    """A daemon thread with an event loop, started at the first use.

    So sync methods can be called in threads with or without a running event loop, and async methods on any loop.
    """

    def __init__(self, at_exit: Callable[[], Coroutine[Any, Any, None]], name: str = "sublet-client") -> None:
        """``at_exit`` runs on the loop when the program ends without having called `stop`."""
        self._at_exit = at_exit
        self._name = name
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    async def run(self, work: Coroutine[Any, Any, T]) -> T:
        loop = self._running()
        if asyncio.get_running_loop() is loop:
            return await work
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, loop))

    def run_sync(self, work: Coroutine[Any, Any, T]) -> T:
        loop = self._running()
        if threading.current_thread() is self._thread:
            work.close()
            raise RuntimeError("the connection's own thread cannot block on itself: use the aio_… method")
        future = asyncio.run_coroutine_threadsafe(work, loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()  # the caller was interrupted (Ctrl-C)
            raise

    def stop(self) -> None:
        with self._lock:
            loop, thread = self._loop, self._thread
            self._loop = self._thread = None
        if loop is None or thread is None:
            return
        atexit.unregister(self._end)
        loop.call_soon_threadsafe(loop.stop)
        if thread is not threading.current_thread():
            thread.join(timeout=THREAD_END_MAX_S)

    def _running(self) -> asyncio.AbstractEventLoop:
        with self._lock:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                self._thread = threading.Thread(target=_run_forever, args=(self._loop,), name=self._name, daemon=True)
                self._thread.start()
                atexit.register(self._end)
            return self._loop

    def _end(self) -> None:
        if self._loop is None or self._thread is None or not self._thread.is_alive():
            return  # stopped before, or a forked process without the thread
        with contextlib.suppress(Exception):  # the program ends anyway
            asyncio.run_coroutine_threadsafe(self._at_exit(), self._loop).result(timeout=CLOSE_AT_EXIT_MAX_S)
        self.stop()


def _run_forever(loop: asyncio.AbstractEventLoop) -> None:
    asyncio.set_event_loop(loop)
    try:
        loop.run_forever()
    finally:
        tasks = asyncio.all_tasks(loop)
        for task in tasks:
            task.cancel()
        loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        loop.close()


class CallersLoop:
    """Runs everything on the event loop of the caller. For tests and simulations, where one loop controls time."""

    async def run(self, work: Coroutine[Any, Any, T]) -> T:
        return await work

    def run_sync(self, work: Coroutine[Any, Any, T]) -> T:
        work.close()
        raise RuntimeError("this client has no background thread (background=False): use the aio_… method")

    def stop(self) -> None:
        """Does nothing: the loop belongs to the caller."""
