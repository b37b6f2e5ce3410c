"""What is ready, and the tickets that bring it to workers: of all pools, as one shard sees them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from sublet_engine.run.state import Lease, TaskRun
from sublet_engine.shard.queues import ReadyQueue, RetainedTicket, TicketUse
from sublet_engine.shard.workers import Worker, Workers
from sublet_protocol.specs import SLOT_KINDS, SlotKind


class Dispatch:
    def __init__(self, workers: Workers, shards: int) -> None:
        self._workers = workers
        self._shards = shards
        self._queues: dict[tuple[str, SlotKind], ReadyQueue] = {}
        self._changed: dict[tuple[str, SlotKind], None] = {}
        """Queues that may need tickets; in order, so that the same messages always give the same tickets."""
        self._queue_of: dict[str, ReadyQueue | None] = {}
        """Where each ready task run stands; None: no pool is known that can run it."""
        self._task_run_of: dict[str, str] = {}
        self._uses: dict[str, TicketUse] = {}

    def __iter__(self) -> Iterator[ReadyQueue]:
        return iter(self._queues.values())

    def queue(self, pool: str, kind: SlotKind) -> ReadyQueue:
        queue = self._queues.get((pool, kind))
        if queue is None:
            queue = self._queues[pool, kind] = ReadyQueue(pool, kind)
        return queue

    # --- ready tasks ------------------------------------------------------------------------------------------

    def enqueue(self, task_run: str, task: TaskRun, priority: int, action: str, kind: SlotKind, now: float) -> None:
        """Put a ready task into the queue of a pool that can run it, or on the side until there is one."""
        pool = self._workers.pool_for(action, now)
        if pool is None:
            self._queue_of[task_run] = None
            return
        queue = self.queue(pool, kind)
        queue.add(task_run, task, priority)
        self._queue_of[task_run] = queue
        self._changed[pool, kind] = None

    def hold_unroutable(self, task_run: str) -> None:
        """A ready task of a workflow that nobody knows."""
        self._queue_of[task_run] = None

    def remove(self, task_run: str) -> None:
        """It is not ready any more."""
        queue = self._queue_of.pop(task_run, None)
        if queue is not None:
            queue.discard(task_run)

    def misplaced(self, now: float) -> list[str]:
        """Ready tasks whose pool does not live, or that have none."""
        dead = {queue: not self._workers.alive(queue.pool, now) for queue in self._queues.values()}
        return [task_run for task_run, queue in self._queue_of.items() if queue is None or dead[queue]]

    def enqueued(self) -> dict[str, str | None]:
        """Every ready task run, and the pool in whose queue it stands (None: on the side)."""
        return {task_run: queue.pool if queue is not None else None for task_run, queue in self._queue_of.items()}

    def pool_of(self, task_run: str) -> str | None:
        """The pool in whose queue it stands."""
        queue = self._queue_of.get(task_run)
        return queue.pool if queue is not None else None

    # --- leases -----------------------------------------------------------------------------------------------

    def begin(self, task_run: str, lease: Lease, kind: SlotKind) -> None:
        """A lease holds a slot."""
        if lease.ticket:
            self._task_run_of[lease.ticket] = task_run
        if not lease.released:
            self.queue(lease.pool, kind).running += 1

    def end(self, task_run: str, lease: Lease, kind: SlotKind) -> None:
        if lease.ticket and self._task_run_of.get(lease.ticket) == task_run:
            del self._task_run_of[lease.ticket]
            self._uses.pop(lease.ticket, None)
        if not lease.released:
            self.queue(lease.pool, kind).running -= 1

    def holder(self, ticket: str) -> str | None:
        """The task run that runs under this ticket."""
        return self._task_run_of.get(ticket)

    def held(self) -> dict[str, str]:
        """The task runs by the tickets that they run under."""
        return dict(self._task_run_of)

    def counted(self) -> set[str]:
        """Tickets whose uses are counted."""
        return set(self._uses)

    def uses(self, lease: Lease) -> TicketUse:
        """Of the ticket that this lease stands on."""
        return self._uses.get(lease.ticket, TicketUse(1, lease.granted_at))

    def used(self, ticket: str, uses: TicketUse) -> None:
        self._uses[ticket] = uses

    # --- tickets ----------------------------------------------------------------------------------------------

    def claimed(self, ticket: str, pool: str, kind: SlotKind) -> None:
        """It is not in the pool's queue any more."""
        queue = self.queue(pool, kind)
        queue.tickets.pop(ticket, None)
        queue.retained.pop(ticket, None)
        self._changed[pool, kind] = None

    def pool_changed(self, pool: str, now: float) -> None:
        """Workers of this pool have come, gone or changed."""
        for kind in SLOT_KINDS:
            queue = self._queues.get((pool, kind))
            if queue is not None:
                self._changed[pool, kind] = None
                if not self._workers.room(pool, kind, now):
                    queue.full_at = now

    def issue(self, now: float, new_id: Callable[[], str]) -> list[tuple[ReadyQueue, str]]:
        """Tickets for what has become ready since the last call."""
        changed, self._changed = self._changed, {}
        issued = []
        for key in changed:
            queue = self._queues[key]
            tickets = queue.issue(self._workers.capacity(*key, now), now, new_id)
            issued += [(queue, ticket) for ticket in tickets]
        return issued

    def forget_lost_tickets(self, now: float) -> list[str]:
        """Tickets that are out for too long although slots are free; returns them."""
        lost: list[str] = []
        for key, queue in self._queues.items():
            if len(queue):
                lost += queue.forget_lost_tickets(now)
                self._changed[key] = None
        return lost

    # --- parked tickets ---------------------------------------------------------------------------------------

    def retain(self, ticket: str, worker: Worker, kind: SlotKind, uses: TicketUse, now: float) -> bool:
        """Keep a ticket for which there is nothing to do now; False if it must go.

        What becomes ready next is then granted with its creation, without a ticket, a claim and a commit. A parked
        ticket is a slot that no other shard can use meanwhile: so all shards together park half of a pool at most.
        """
        queue = self.queue(worker.pool, kind)
        allowed = self._workers.capacity(worker.pool, kind, now) // (2 * self._shards)
        if len(queue.retained) >= allowed or uses.exhausted(now) or worker.draining:
            return False
        queue.retained[ticket] = RetainedTicket(worker.id, uses, now)
        return True

    def to_serve(self) -> Iterator[tuple[ReadyQueue, str, RetainedTicket]]:
        """Parked tickets that can be served now. Each must be served when the next one is asked for."""
        for key in list(self._changed):
            queue = self._queues[key]
            while queue.retained and queue.best() is not None:
                ticket = next(reversed(queue.retained))
                yield queue, ticket, queue.retained.pop(ticket)

    def dismiss_retained(self, whose: Callable[[RetainedTicket], bool]) -> list[tuple[str, RetainedTicket]]:
        """Take out the parked tickets that are to go."""
        gone = []
        for queue in self._queues.values():
            going = [(ticket, retained) for ticket, retained in queue.retained.items() if whose(retained)]
            for ticket, _ in going:
                del queue.retained[ticket]
            gone += going
        return gone
