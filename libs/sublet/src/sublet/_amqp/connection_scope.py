"""Ends the waits of those who depend on something that has died, wherever in foreign code they wait.

A client of AMQP may wait for ever in the queue to a socket that is dead, and when a channel dies it cancels whoever
waits for it. Both become an ordinary error here.
"""

from __future__ import annotations

import asyncio
from types import TracebackType


class LifelineCut(ConnectionError):
    """What this code depended on has died."""


class Lifeline:
    """Of one thing that can die, once."""

    def __init__(self) -> None:
        self._holds: set[_Hold] = set()
        self._cut = False

    def held(self) -> _Hold:
        """A ``with`` block that ends with `LifelineCut` when the line is cut, and when its code is cancelled by
        something else than a call of ``cancel()`` on its task."""
        return _Hold(self)

    def cut(self) -> None:
        self._cut = True
        holds, self._holds = self._holds, set()
        for hold in holds:
            hold.let_go()

    def _take(self, hold: _Hold) -> None:
        if self._cut:
            raise LifelineCut("the connection has been lost")
        self._holds.add(hold)

    def _leave(self, hold: _Hold) -> None:
        self._holds.discard(hold)


class _Hold:
    __slots__ = ("_cancelled_before", "_interrupted", "_line", "_task")

    def __init__(self, line: Lifeline) -> None:
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
            raise LifelineCut("the connection was lost") from error

    def let_go(self) -> None:
        # Code that cuts the line that it holds itself does not wait: it goes on to its end.
        if self._task is not asyncio.current_task():
            self._interrupted = True
            self._task.cancel()
