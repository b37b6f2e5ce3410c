"""Cancels code that waits on a connection when that connection closes.

The AMQP client library may wait without end for a dead socket, and when a channel closes it cancels the code that waits
for it. In a scope both become an ordinary exception, `ConnectionScopeClosed`.
"""

from __future__ import annotations

import asyncio
from types import TracebackType


class ConnectionScopeClosed(ConnectionError):
    """The connection that this code used is closed."""


class ConnectionScope:
    """The scope of one connection. It can be closed once."""

    def __init__(self) -> None:
        self._guards: set[_Guard] = set()
        self._closed = False

    def held(self) -> _Guard:
        """A guard for a ``with`` block.

        The block ends with `ConnectionScopeClosed` when the scope is closed, and when its code is cancelled by anything
        other than a call of ``cancel()`` on its task.
        """
        return _Guard(self)

    def close(self) -> None:
        self._closed = True
        guards, self._guards = self._guards, set()
        for guard in guards:
            guard.cancel()

    def _enter(self, guard: _Guard) -> None:
        if self._closed:
            raise ConnectionScopeClosed("the connection has been lost")
        self._guards.add(guard)

    def _leave(self, guard: _Guard) -> None:
        self._guards.discard(guard)


class _Guard:
    __slots__ = ("_cancelled_before", "_interrupted", "_scope", "_task")

    def __init__(self, scope: ConnectionScope) -> None:
        task = asyncio.current_task()
        if task is None:
            raise RuntimeError("only code of an asyncio task can be guarded by a connection scope")
        self._scope = scope
        self._task = task
        self._cancelled_before = task.cancelling()
        self._interrupted = False

    def __enter__(self) -> None:
        self._scope._enter(self)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._scope._leave(self)
        cancelled = self._task.uncancel() if self._interrupted else self._task.cancelling()
        if isinstance(error, asyncio.CancelledError) and cancelled <= self._cancelled_before:
            raise ConnectionScopeClosed("the connection was lost") from error

    def cancel(self) -> None:
        # Code that closes the scope in which it runs does not wait for the connection, so it is not interrupted.
        if self._task is not asyncio.current_task():
            self._interrupted = True
            self._task.cancel()
