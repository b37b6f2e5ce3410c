"""Ready queues: which tasks of a pool may run, in which order, and how many tickets are out for them."""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

from sublet_engine.run.state import TaskRun
from sublet_protocol import limits
from sublet_protocol.specs import SlotKind


class TicketUse(NamedTuple):
    """Of a ticket: grants under it so far, and when the first of them was made."""

    grants: int
    since: float

    def exhausted(self, now: float) -> bool:
        """It must go back to its queue."""
        return self.grants >= limits.TICKET_REUSE_MAX or now - self.since > limits.TICKET_REUSED_MAX_S

    def next(self) -> TicketUse:
        return TicketUse(self.grants + 1, self.since)


class RetainedTicket(NamedTuple):
    """A ticket that a shard keeps although nothing is ready: who holds it, how it was used, since when."""

    worker: str
    uses: TicketUse
    since: float


class ReadyQueue:
    """The ready tasks of one pool and slot kind, as one shard sees them.

    Best first: resumed before new, then priority, then age.
    """

    def __init__(self, pool: str, kind: SlotKind) -> None:
        self.pool = pool
        self.kind = kind
        self.tickets: dict[str, float] = {}
        """Tickets that are out and not claimed: id to the time of issue."""
        self.retained: dict[str, RetainedTicket] = {}
        """Tickets that workers hold for us although nothing was ready."""
        self.running = 0
        """Leases of this shard that hold a slot of this pool and kind."""
        self.full_at = -math.inf
        """When all slots were taken last, by whatever shard's tasks."""
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
        """Its entry in the heap is passed over when it comes up."""
        self._ready.pop(task_run, None)

    def best(self) -> str | None:
        """The task run to grant next; stays in the queue until it is discarded."""
        while self._heap:
            *_, number, task_run = self._heap[0]
            if self._ready.get(task_run) == number:
                return task_run
            heapq.heappop(self._heap)
        return None

    def forget_lost_tickets(self, now: float) -> list[str]:
        """Tickets out for too long do not count any more; returns those for which there was room all the time."""
        late = {ticket: at for ticket, at in self.tickets.items() if now - at > limits.TICKET_LOST_S}
        for ticket in late:
            del self.tickets[ticket]
        there_was_room = now - self.full_at > limits.TICKET_LOST_S
        return list(late) if there_was_room else []

    def issue(self, capacity: int, now: float, new_id: Callable[[], str]) -> list[str]:
        """New tickets, so that there is one out for every ready task that a free slot could take.

        ``capacity``: slots of this kind of the pool's live workers. Even when all are taken one ticket stands in the
        queue, so that this shard gets its turn.
        """
        if capacity == 0 or not self._ready:
            return []
        wanted = min(len(self._ready), max(1, capacity - self.running)) - len(self.tickets)
        issued = [new_id() for _ in range(wanted)]
        self.tickets.update((ticket, now) for ticket in issued)
        return issued
