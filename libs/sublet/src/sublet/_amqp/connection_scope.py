"""Ends the waits of those who depend on something that has died, wherever in foreign code they wait.

A client of AMQP may wait for ever in the queue to a socket that is dead, and when a channel dies it cancels whoever
waits for it. Both become an ordinary error here.
"""

from __future__ import annotations

import asyncio
from types import TracebackType


class ConnectionScopeClosed(ConnectionError):
    """What this code depended on has died."""


class ConnectionScope:
    """Of one thing that can die, once."""

    def __init__(self) -> None:
        self._guards: set[_Guard] = set()
        self._closed = False

    def held(self) -> _Guard:
        """A ``with`` block that ends with `ConnectionScopeClosed` when the scope is closed, and when its code is
        cancelled by something else than a call of ``cancel()`` on its task."""
        return _Guard(self)

    def close(self) -> None:
        self._closed = True
        holds, self._guards = self._guards, set()
        for hold in holds:
            hold.cancel()

    def _take(self, hold: _Guard) -> None:
        if self._closed:
            raise ConnectionScopeClosed("the connection has been lost")
        self._guards.add(hold)

    def _leave(self, hold: _Guard) -> None:
        self._guards.discard(hold)


class _Guard:
    __slots__ = ("_cancelled_before", "_interrupted", "_line", "_task")

    def __init__(self, line: ConnectionScope) -> None:
        task = asyncio.current_task()
        if task is None:
            raise RuntimeError("only code of an asyncio task can hold a lifeline")
        self._line = line
        self._task = task
        self._cancelled_before = task.cancelling()
        self._interrupted = False

    def __enter__(self) -> None:
        self._line._take(self)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._line._leave(self)
        cancelled = self._task.uncancel() if self._interrupted else self._task.cancelling()
        if isinstance(error, asyncio.CancelledError) and cancelled <= self._cancelled_before:
            raise ConnectionScopeClosed("the connection was lost") from error

    def cancel(self) -> None:
        # Code that cuts the line that it holds itself does not wait: it goes on to its end.
        if self._task is not asyncio.current_task():
            self._interrupted = True
            self._task.cancel()
