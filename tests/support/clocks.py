"""Clocks for tests."""

from __future__ import annotations


class ManualClock:
    """A clock that only the test advances."""

    def __init__(self, now: float = 1_700_000_000.0) -> None:
        self.time = now

    def now(self) -> float:
        return self.time

    def advance(self, by_s: float) -> None:
        self.time += by_s
