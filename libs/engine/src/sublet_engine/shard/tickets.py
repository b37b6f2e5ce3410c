"""Tickets, claims and grants.

A shard issues tickets for ready tasks. A worker that has a free slot claims a ticket and gets the best ready task
(`ReadyQueue.best`), or is told that no task is ready. A worker that reports an end asks for the next task under the
same ticket. If no task is ready then, the shard may retain the ticket for the next one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import NamedTuple

from sublet_engine.run import leases
from sublet_engine.run.state import OutgoingMessage, Run, TaskRun
from sublet_engine.shard.held_tickets import TicketUse
from sublet_engine.shard.ready_queue import ReadyQueue
from sublet_engine.shard.state import ShardState
from sublet_engine.shard.unit_of_work import DurableGrant
from sublet_engine.shard.workers import Worker
from sublet_protocol import ids, limits
from sublet_protocol.destinations import Pool
from sublet_protocol.messages import Claim, NoTask, Ping, Ticket, encode_one
from sublet_protocol.specs import SLOT_KINDS, SlotKind


class RetainedTicket(NamedTuple):
    """A ticket that a shard keeps although nothing is ready: its worker's id, its use, and since when."""

    worker: str
    use: TicketUse
    since: float


class Tickets:
    """``claim_key``: the routing key of claims for the tickets of this shard."""

    def __init__(self, state: ShardState, claim_key: str, new_id: Callable[[], str]) -> None:
        self._state = state
        self._claim_key, self._new_id = claim_key, new_id
        self._issued: dict[ReadyQueue, dict[str, float]] = defaultdict(dict)
        """Tickets that are not claimed yet: time of issue (Unix seconds) by id."""
        self._retained: dict[ReadyQueue, dict[str, RetainedTicket]] = defaultdict(dict)
        self._full_at: dict[ReadyQueue, float] = {}
        """When tasks of all shards last took all slots of the pool (Unix seconds)."""

    # --- issued tickets ---------------------------------------------------------------------------------------

    def issue(self) -> list[OutgoingMessage]:
        """Serve ready tasks under retained tickets, and issue new tickets for the others."""
        self._serve_retained()
        issued: list[OutgoingMessage] = []
        for queue in self._state.ready.take_changed():
            issued += self._issue(queue)
        self._state.counters.tickets_issued += len(issued)
        return issued

    def _issue(self, queue: ReadyQueue) -> list[OutgoingMessage]:
        state, out = self._state, self._issued[queue]
        capacity = state.workers.capacity(queue.pool, queue.kind, state.now)
        new = [self._new_id() for _ in range(queue.tickets_needed(capacity) - len(out))]
        out.update((ticket, state.now) for ticket in new)
        to = Pool(queue.pool, queue.kind)
        bodies = [encode_one(Ticket(ticket, self._claim_key, state.shard_key)) for ticket in new]
        return [OutgoingMessage(to, body, durable=False) for body in bodies]

    def pool_changed(self, pool: str) -> None:
        """Workers of this pool were added, changed or lost, or have sent a heartbeat."""
        state = self._state
        for kind in SLOT_KINDS:
            queue = state.ready.get(pool, kind)
            if queue is not None:
                state.ready.mark_changed(queue)
                if not state.workers.room(pool, kind, state.now):
                    self._full_at[queue] = state.now

    def forget_lost(self) -> list[str]:
        """Stop counting tickets that have not been claimed for too long.

        Returns those that count as lost, because tasks were ready and slots were free all that time.
        """
        lost: list[str] = []
        for queue in self._state.ready:
            if len(queue):
                lost += self._forget_lost(queue)
                self._state.ready.mark_changed(queue)
        return lost

    def _forget_lost(self, queue: ReadyQueue) -> list[str]:
        now, out = self._state.now, self._issued[queue]
        late = [ticket for ticket, issued_at in out.items() if now - issued_at > limits.TICKET_LOST_S]
        for ticket in late:
            del out[ticket]
        was_full = queue in self._full_at and now - self._full_at[queue] <= limits.TICKET_LOST_S
        return [] if was_full else late

    # --- claims -----------------------------------------------------------------------------------------------

    def claimed(self, claim: Claim) -> None:
        """A worker has a free slot. The claim says for which pool and kind; the ticket may be of another owner."""
        state = self._state
        if state.workers.get(claim.worker) is None:
            state.send(claim.inbox, Ping(hello=not state.workers.known(claim.pool)))
        worker = state.workers.add(claim.worker, claim.pool, claim.inbox, state.now)
        self._remove(claim.ticket, state.ready.get_or_add(claim.pool, claim.kind))
        if not self._grant_again(claim, worker):
            self.serve(claim.ticket, worker, claim.kind)

    def _remove(self, ticket: str, queue: ReadyQueue) -> None:
        """The ticket is not in the pool's queue any more."""
        self._issued[queue].pop(ticket, None)
        self._retained[queue].pop(ticket, None)
        self._state.ready.mark_changed(queue)

    def _grant_again(self, claim: Claim, worker: Worker) -> bool:
        """Answer a claim for a ticket that the same worker holds a lease under already, with the same lease.

        The first grant got lost, or crossed with a repeated claim. But if the ticket was redelivered and the worker
        lists the lease, the worker wants another task: the lease continues without a ticket.
        """
        held = self._state.held_tickets.task_run_of(claim.ticket)
        if held is None:
            return False
        run, task = self._state.find(held)
        if task.lease is None or task.lease.worker != claim.worker:
            self._doubt_holder(task)
            return False
        if claim.redelivered and ids.lease_id(held, task.invocation) in worker.listed:
            return False
        self._send_grant(run, task)
        return True

    def _doubt_holder(self, task: TaskRun) -> None:
        """The ticket of a lease was redelivered to another worker: the connection of the holder broke, or it died."""
        lease, state = task.lease, self._state
        assert lease is not None
        holder = state.workers.get_or_add(lease.worker, lease.pool, lease.inbox, state.now)
        if holder.suspected_at is None:
            holder.suspected_at = state.now
            state.send(lease.inbox, Ping())

    # --- grants -----------------------------------------------------------------------------------------------

    def serve(self, ticket: str, worker: Worker, kind: SlotKind, use: TicketUse | None = None) -> None:
        """Grant the best ready task under this ticket, retain the ticket, or tell the worker to acknowledge it.

        ``use``: how the ticket was used before; None for a new one, which is never retained.
        """
        queue = self._state.ready.get_or_add(worker.pool, kind)
        task_run = queue.best()
        if task_run is not None and not worker.draining:
            self._grant(task_run, ticket, worker, use)
        elif use is None or not self._retain(ticket, worker, queue, use):
            self._state.send(worker.inbox, NoTask(ticket))

    def serve_next(self, ticket: str, worker: Worker, kind: SlotKind, use: TicketUse) -> None:
        """The worker asks for the next task under a ticket that it has used already."""
        if use.exhausted(self._state.now):
            self._state.send(worker.inbox, NoTask(ticket))
        else:
            self.serve(ticket, worker, kind, use)

    def _grant(self, task_run: str, ticket: str, worker: Worker, use: TicketUse | None) -> None:
        state = self._state
        run, task = state.find(task_run)
        spec = state.workflow_of(run)
        assert spec is not None
        after = leases.grant(
            run, task.name, spec, worker=worker.id, inbox=worker.inbox, pool=worker.pool, ticket=ticket, now=state.now
        )
        state.counters.granted(task, state.now, reused=use is not None)
        state.put(run, after, state.effects())
        state.held_tickets.used(ticket, use.next() if use is not None else TicketUse(1, state.now))
        self._send_grant(after, after.task(task.name))

    def _send_grant(self, run: Run, task: TaskRun) -> None:
        state, lease = self._state, task.lease
        spec = state.workflow_of(run)
        assert spec is not None
        assert lease is not None
        grant = leases.grant_message(run, task, spec, state.now, claim_key=self._claim_key, shards=state.shards)
        if task.log_length:
            state.unit_of_work.durable_grants.append(DurableGrant(lease.inbox, grant, task, run.task_run_id(task)))
        else:
            state.send(lease.inbox, grant)

    # --- retained tickets -------------------------------------------------------------------------------------

    def _retain(self, ticket: str, worker: Worker, queue: ReadyQueue, use: TicketUse) -> bool:
        """Keep a ticket for the next ready task; False if that is not allowed.

        The next ready task is then granted in the commit that makes it ready, without a ticket and a claim. But no
        other shard can use the slot meanwhile, so all shards together retain at most half of a pool's slots.
        """
        state = self._state
        allowed = state.workers.capacity(queue.pool, queue.kind, state.now) // (2 * state.shards)
        if len(self._retained[queue]) >= allowed or use.exhausted(state.now) or worker.draining:
            return False
        self._retained[queue][ticket] = RetainedTicket(worker.id, use, state.now)
        return True

    def _serve_retained(self) -> None:
        """Grant ready tasks under retained tickets, the most recent ticket first."""
        state = self._state
        for queue in state.ready.changed():
            retained_tickets = self._retained[queue]
            while retained_tickets and queue.best() is not None:
                ticket, retained = retained_tickets.popitem()
                worker = state.workers.get(retained.worker)
                if worker is not None and worker.live(state.now):
                    self.serve(ticket, worker, queue.kind, retained.use)

    def dismiss_worker(self, worker_id: str) -> None:
        """Tell a worker to acknowledge its retained tickets."""
        self._dismiss(lambda retained: retained.worker == worker_id)

    def dismiss_expired(self) -> None:
        """Tell workers to acknowledge tickets that have been retained for `limits.TICKET_RETAINED_S`."""
        self._dismiss(lambda retained: retained.since <= self._state.now - limits.TICKET_RETAINED_S)

    def _dismiss(self, is_due: Callable[[RetainedTicket], bool]) -> None:
        for queue in self._state.ready:
            due = {ticket: retained for ticket, retained in self._retained[queue].items() if is_due(retained)}
            for ticket, retained in due.items():
                del self._retained[queue][ticket]
                worker = self._state.workers.get(retained.worker)
                if worker is not None:
                    self._state.send(worker.inbox, NoTask(ticket))

    # --- counts -----------------------------------------------------------------------------------------------

    def occupancy(self) -> Iterable[tuple[str, SlotKind, int, int]]:
        """For each pool and kind: its slots, and how many of them leases of this shard hold."""
        state = self._state
        for pool in state.workers.pools:
            for kind in SLOT_KINDS:
                capacity = state.workers.capacity(pool, kind, state.now)
                queue = state.ready.get(pool, kind)
                if capacity or queue is not None:
                    yield pool, kind, capacity, queue.running if queue is not None else 0
