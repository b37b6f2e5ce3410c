"""Exponential backoff between attempts."""

from __future__ import annotations


class Backoff:
    """The delay doubles from ``first_s`` up to ``most_s``. Call `reset` after a success."""

    def __init__(self, first_s: float = 0.1, most_s: float = 5.0) -> None:
        self._first_s = first_s
        self._most_s = most_s
        self._next_s = first_s

    def next_s(self) -> float:
        """The delay before the next attempt, in seconds."""
        delay_s = self._next_s
        self._next_s = min(self._next_s * 2, self._most_s)
        return delay_s

    def reset(self) -> None:
        self._next_s = self._first_s
