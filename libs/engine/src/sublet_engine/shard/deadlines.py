"""When tasks time out, soonest first."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator

from sublet_engine.run.state import TaskRun
from sublet_protocol import limits

SLACK = 10_000
"""Deadlines that were met or moved may stay in the heap up to this number, and up to that of those that stand."""


def deadline_of(task: TaskRun) -> float | None:
    """When a task times out as things stand: the execution timeout under a lease, the schedule timeout without."""
    if task.lease is not None:
        return task.lease.deadline + limits.EXECUTION_GRACE_S if task.lease.deadline is not None else None
    return task.schedule_deadline if task.status == "READY" else None


class Deadlines:
    """``task`` looks up a task by run id and name, as it is now: entries are checked against it when they come up."""

    def __init__(self, task: Callable[[str, str], TaskRun | None], slack: int = SLACK) -> None:
        self._task = task
        self._slack = slack
        self._heap: list[tuple[float, str, str]] = []
        self._heap_max = slack

    def __len__(self) -> int:
        return len(self._heap)

    def add(self, run_id: str, task: TaskRun) -> None:
        """Note when this task times out, if it does. What was noted before stays, and is passed over."""
        deadline = deadline_of(task)
        if deadline is not None:
            heapq.heappush(self._heap, (deadline, run_id, task.name))

    def expire(self, now: float, undecided: Callable[[str, TaskRun, float], bool]) -> Iterator[tuple[str, TaskRun]]:
        """The tasks whose deadline has passed, as (run id, task); those for which it is unclear stay for the next time.
        A task must have changed when the next one is asked for."""
        kept = []
        while self._heap and self._heap[0][0] <= now:
            entry = heapq.heappop(self._heap)
            at, run_id, name = entry
            task = self._task(run_id, name)
            if task is None or deadline_of(task) != at:
                continue  # it ended, or the deadline has moved; a later entry stands for it
            if undecided(run_id, task, at):
                kept.append(entry)
            else:
                yield run_id, task
        for entry in kept:
            heapq.heappush(self._heap, entry)

    def trim(self) -> None:
        """Drop what was met or moved, once there is much of it."""
        if len(self._heap) > self._heap_max:
            self._heap = [entry for entry in set(self._heap) if self._stands(*entry)]
            heapq.heapify(self._heap)
            self._heap_max = 2 * len(self._heap) + self._slack

    def _stands(self, at: float, run_id: str, name: str) -> bool:
        task = self._task(run_id, name)
        return task is not None and deadline_of(task) == at
