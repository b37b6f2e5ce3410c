"""Measures the active time of a task, which its execution timeout limits."""

from __future__ import annotations

from collections.abc import Callable


class ActiveClock:
    """Counts seconds from its creation, except while it is paused. ``time`` is a monotonic clock in seconds."""

    __slots__ = ("_counted_s", "_since", "_time", "allowed_s")

    def __init__(self, time: Callable[[], float], allowed_s: float) -> None:
        self._time = time
        self._counted_s = 0.0
        self._since: float | None = time()
        self.allowed_s = allowed_s

    @property
    def active_s(self) -> float:
        return self._counted_s + (self._time() - self._since if self._since is not None else 0.0)

    @property
    def is_exceeded(self) -> bool:
        return self._since is not None and self.active_s >= self.allowed_s

    def resume(self) -> None:
        if self._since is None:
            self._since = self._time()

    def pause(self) -> None:
        """Stop counting: the task waits, or has ended."""
        self._counted_s = self.active_s
        self._since = None

    def extend(self, by_s: float) -> None:
        self.allowed_s += by_s
