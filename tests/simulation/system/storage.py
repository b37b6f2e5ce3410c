"""The database of the simulation: it can be slow, and fail before or after an operation takes effect."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

from simulation.system.processes import ProcessLoop
from sublet_engine.run.state import LogRecord, Run
from sublet_platform.memory import MemoryDatabase, MemoryRunStore
from sublet_platform.ports import Clock, RunChange, StoreUnavailable

OnCommit = Callable[[Run | None, Run], None]
"""Called with the stored run, if there is one, and the run that replaces it."""


@dataclass
class Condition:
    """Faults of the database, for one process or for all: probabilities, and seconds of virtual time."""

    refuses: float = 0.0
    """An operation fails before it takes effect."""
    forgets_to_answer: float = 0.0
    """An operation fails after it took effect."""
    half_done: float = 0.0
    """A bulk write fails after a part of it took effect."""
    slow_s: float = 0.0


class _Runs(dict[str, Run]):
    def __init__(self, on_commit: OnCommit) -> None:
        super().__init__()
        self._on_commit = on_commit

    def __setitem__(self, run_id: str, run: Run) -> None:
        self._on_commit(self.get(run_id), run)
        super().__setitem__(run_id, run)


class Database(MemoryDatabase):
    """``conditions``: by role; "" is for all."""

    def __init__(self, loop: ProcessLoop, random: Random, latency_s: float, on_commit: OnCommit) -> None:
        super().__init__()
        self.conditions: dict[str, Condition] = {}
        self.runs = _Runs(on_commit)
        self.before, self.after = self._before, self._after
        self._loop = loop
        self._random = random
        self._latency_s = latency_s

    def condition(self) -> Condition | None:
        """The condition for the process that takes the current step."""
        process = self._loop.process
        return (self.conditions.get(process.role) if process is not None else None) or self.conditions.get("")

    def happens(self, probability: float) -> bool:
        return probability > 0 and self._random.random() < probability

    def some_of(self, items: Sequence[RunChange]) -> list[RunChange]:
        return [item for item in items if self._random.random() < 0.5]

    async def _before(self, operation: str) -> None:
        condition = self.condition()
        await self._pause(condition)
        if condition is not None and self.happens(condition.refuses):
            raise StoreUnavailable(f"{operation}: refused by the simulation")

    async def _after(self, operation: str) -> None:
        condition = self.condition()
        await self._pause(condition)
        if condition is not None and self.happens(condition.forgets_to_answer):
            raise StoreUnavailable(f"{operation}: done, but the simulation lost the answer")

    async def _pause(self, condition: Condition | None) -> None:
        pause_s = self._random.random() * self._latency_s
        if condition is not None and condition.slow_s:
            pause_s += self._random.random() * condition.slow_s
        await asyncio.sleep(pause_s)


class RunStore(MemoryRunStore):
    """Bulk writes may fail after a part took effect."""

    def __init__(self, database: Database, clock: Clock) -> None:
        super().__init__(database, clock)
        self._db = database

    async def commit(self, changes: Sequence[RunChange]) -> None:
        condition = self._db.condition()
        if condition is not None and self._db.happens(condition.half_done):
            await super().commit(self._db.some_of(changes))
            raise StoreUnavailable("commit: half done by the simulation")
        await super().commit(changes)

    async def append_log(self, records: Sequence[LogRecord]) -> None:
        condition = self._db.condition()
        if condition is not None and self._db.happens(condition.half_done):
            await super().append_log(records[::2])
            raise StoreUnavailable("append_log: half done by the simulation")
        await super().append_log(records)
