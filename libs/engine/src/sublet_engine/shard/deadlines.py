"""The deadlines of tasks, in order of time."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator

from sublet_engine.run.state import TaskRun
from sublet_protocol import limits

SLACK = 10_000
"""The heap is trimmed when it has more than this many outdated entries, and more outdated than valid ones."""


def deadline_of(task: TaskRun) -> float | None:
    """When a task times out (Unix seconds; None: never): by its execution timeout under a lease, else by its schedule
    timeout."""
    if task.lease is not None:
        return task.lease.deadline + limits.EXECUTION_GRACE_S if task.lease.deadline is not None else None
    return task.schedule_deadline if task.status == "READY" else None


class Deadlines:
    """``task`` returns the current state of a task by run id and name. It is compared with entries that are due."""

    def __init__(self, task: Callable[[str, str], TaskRun | None], slack: int = SLACK) -> None:
        self._task = task
        self._slack = slack
        self._heap: list[tuple[float, str, str]] = []
        self._heap_max = slack

    def __len__(self) -> int:
        return len(self._heap)

    def add(self, run_id: str, task: TaskRun) -> None:
        """Add the deadline of this task, if it has one. An earlier entry stays in the heap and is skipped later."""
        deadline = deadline_of(task)
        if deadline is not None:
            heapq.heappush(self._heap, (deadline, run_id, task.name))

    def expire(self, now: float, undecided: Callable[[str, TaskRun, float], bool]) -> Iterator[tuple[str, TaskRun]]:
        """The tasks whose deadline has passed, as (run id, task).

        Tasks for which ``undecided(run id, task, deadline)`` is true stay for the next call. The caller must change
        each task before it takes the next one.
        """
        undecided_entries = []
        while self._heap and self._heap[0][0] <= now:
            entry = heapq.heappop(self._heap)
            at, run_id, name = entry
            task = self._task(run_id, name)
            if task is None or deadline_of(task) != at:
                continue  # the task has ended, or its deadline has moved and has an entry of its own
            if undecided(run_id, task, at):
                undecided_entries.append(entry)
            else:
                yield run_id, task
        for entry in undecided_entries:
            heapq.heappush(self._heap, entry)

    def trim(self) -> None:
        """Drop outdated entries, if there are many."""
        if len(self._heap) > self._heap_max:
            self._heap = [entry for entry in set(self._heap) if self._is_valid(*entry)]
            heapq.heapify(self._heap)
            self._heap_max = 2 * len(self._heap) + self._slack

    def _is_valid(self, at: float, run_id: str, name: str) -> bool:
        task = self._task(run_id, name)
        return task is not None and deadline_of(task) == at
