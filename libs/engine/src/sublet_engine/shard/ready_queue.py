"""Ready queues: which tasks of a pool may run, and in which order.

`ReadyQueue.best` decides which ready task a claim gets. `ReadyQueues` decides in which pool's queue a task is.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterator

from sublet_engine.run.state import Lease, TaskRun
from sublet_engine.shard.workers import Workers
from sublet_protocol.specs import SlotKind


class ReadyQueue:
    """The ready tasks of one pool and slot kind, as one shard sees them.

    Best first: resumed tasks before new ones, then by priority, then by age.
    """

    def __init__(self, pool: str, kind: SlotKind) -> None:
        self.pool = pool
        self.kind = kind
        self.running = 0
        """Leases of this shard that hold a slot of this pool and kind."""
        self._heap: list[tuple[bool, int, float, int, str]] = []
        self._ready: dict[str, int] = {}
        self._counter = itertools.count()

    def __len__(self) -> int:
        return len(self._ready)

    def task_runs(self) -> list[str]:
        return list(self._ready)

    def add(self, task_run: str, task: TaskRun, priority: int) -> None:
        number = next(self._counter)
        self._ready[task_run] = number
        heapq.heappush(self._heap, (not task.resumed, -priority, task.ready_at or 0.0, number, task_run))

    def discard(self, task_run: str) -> None:
        """Remove a task. Its entry stays in the heap and is skipped by `best`."""
        self._ready.pop(task_run, None)

    def best(self) -> str | None:
        """The task run that the next claim gets; None if no task is ready. It stays in the queue until `discard`."""
        while self._heap:
            *_, number, task_run = self._heap[0]
            if self._ready.get(task_run) == number:
                return task_run
            heapq.heappop(self._heap)
        return None

    def tickets_needed(self, capacity: int) -> int:
        """How many tickets must be out: one for every ready task that a free slot could take.

        ``capacity``: slots of this kind of the pool's live workers. Even if this shard's leases take all of them, one
        ticket waits in the pool's queue, so that the shard gets its turn.
        """
        if capacity == 0 or not self._ready:
            return 0
        return min(len(self._ready), max(1, capacity - self.running))


class ReadyQueues:
    """The ready queues of all pools, and the ready tasks that no known pool can run."""

    def __init__(self, workers: Workers) -> None:
        self._workers = workers
        self._queues: dict[tuple[str, SlotKind], ReadyQueue] = {}
        self._changed: dict[ReadyQueue, None] = {}
        """Queues that may need tickets; in order, so that the same messages always give the same tickets."""
        self._queue_of: dict[str, ReadyQueue | None] = {}
        """The queue of each ready task run; None if no known pool can run it."""

    def __iter__(self) -> Iterator[ReadyQueue]:
        return iter(self._queues.values())

    def get(self, pool: str, kind: SlotKind) -> ReadyQueue | None:
        return self._queues.get((pool, kind))

    def get_or_add(self, pool: str, kind: SlotKind) -> ReadyQueue:
        queue = self._queues.get((pool, kind))
        if queue is None:
            queue = self._queues[pool, kind] = ReadyQueue(pool, kind)
        return queue

    # --- ready tasks ------------------------------------------------------------------------------------------

    def enqueue(self, task_run: str, task: TaskRun, priority: int, action: str, kind: SlotKind, now: float) -> None:
        """Add a ready task to the queue of a pool that can run ``action``, or to the unroutable tasks."""
        pool = self._workers.pool_for(action, now)
        if pool is None:
            self.hold_unroutable(task_run)
            return
        queue = self.get_or_add(pool, kind)
        queue.add(task_run, task, priority)
        self._queue_of[task_run] = queue
        self.mark_changed(queue)

    def hold_unroutable(self, task_run: str) -> None:
        """Add a ready task that no known pool can run. `misplaced` returns it until it is in a queue."""
        self._queue_of[task_run] = None

    def remove(self, task_run: str) -> None:
        """The task is no longer ready."""
        queue = self._queue_of.pop(task_run, None)
        if queue is not None:
            queue.discard(task_run)

    def misplaced(self, now: float) -> list[str]:
        """Ready tasks in the queue of a pool without live workers, or in no queue."""
        dead = {queue: not self._workers.alive(queue.pool, now) for queue in self}
        return [task_run for task_run, queue in self._queue_of.items() if queue is None or dead[queue]]

    def pool_of(self, task_run: str) -> str | None:
        """The pool of the queue that the task is in."""
        queue = self._queue_of.get(task_run)
        return queue.pool if queue is not None else None

    # --- slots ------------------------------------------------------------------------------------------------

    def lease_began(self, lease: Lease, kind: SlotKind) -> None:
        """A lease takes a slot, unless the task has released it."""
        if not lease.released:
            self.get_or_add(lease.pool, kind).running += 1

    def lease_ended(self, lease: Lease, kind: SlotKind) -> None:
        if not lease.released:
            self.get_or_add(lease.pool, kind).running -= 1

    # --- changes ----------------------------------------------------------------------------------------------

    def mark_changed(self, queue: ReadyQueue) -> None:
        """The queue may need tickets."""
        self._changed[queue] = None

    def changed(self) -> list[ReadyQueue]:
        """The queues that were marked since the last `take_changed`, in that order."""
        return list(self._changed)

    def take_changed(self) -> list[ReadyQueue]:
        """As `changed`; the marks are removed."""
        changed, self._changed = self._changed, {}
        return list(changed)
