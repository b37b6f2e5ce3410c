"""Tickets, claims and grants: a worker that has room gets the best ready task, or is told that there is none."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from sublet_engine.run import leases
from sublet_engine.run.state import Run, TaskRun
from sublet_engine.shard.queues import RetainedTicket, TicketUse
from sublet_engine.shard.state import ShardState
from sublet_engine.shard.unit_of_work import DurableGrant, Publication
from sublet_engine.shard.workers import Worker
from sublet_protocol import ids
from sublet_protocol.messages import Claim, NoTask, Ping, Ticket, encode_one
from sublet_protocol.specs import SLOT_KINDS, SlotKind


class Granting:
    """``claim_key``: where workers send claims for the tickets that are issued here."""

    def __init__(self, state: ShardState, claim_key: str, new_id: Callable[[], str]) -> None:
        self._state = state
        self._claim_key, self._new_id = claim_key, new_id

    # --- claims -----------------------------------------------------------------------------------------------

    def claimed(self, claim: Claim) -> None:
        """A worker has room. The claim decides, whatever the ticket was issued for."""
        state = self._state
        if state.workers.get(claim.worker) is None:
            state.send(claim.inbox, Ping(hello=not state.workers.known(claim.pool)))
        worker = state.workers.add(claim.worker, claim.pool, claim.inbox, state.now)
        state.dispatch.claimed(claim.ticket, claim.pool, claim.kind)
        held = state.dispatch.holder(claim.ticket)
        if held is not None:
            run, task = state.find(held)
            if task.lease is not None and task.lease.worker == claim.worker:
                if not (claim.redelivered and ids.lease_id(held, task.invocation) in worker.listed):
                    self._send_grant(run, task)  # it got lost, or crossed with a repeated claim: the same lease again
                    return
                # The ticket came again, for another task: what was granted under it runs on without one.
            else:
                self._doubt_holder(task)
        self.serve(claim.ticket, worker, claim.kind)

    def _doubt_holder(self, task: TaskRun) -> None:
        """A ticket came back although a lease stands on it: its worker's connection broke, or it is dead."""
        lease, state = task.lease, self._state
        assert lease is not None
        holder = state.workers.get_or_add(lease.worker, lease.pool, lease.inbox, state.now)
        if holder.suspected_at is None:
            holder.suspected_at = state.now
            state.send(lease.inbox, Ping())

    # --- grants -----------------------------------------------------------------------------------------------

    def serve(self, ticket: str, worker: Worker, kind: SlotKind, uses: TicketUse | None = None) -> None:
        """Grant the best ready task under this ticket, or let the ticket go. ``uses``: how it was used before."""
        dispatch = self._state.dispatch
        task_run = dispatch.queue(worker.pool, kind).best()
        if task_run is not None and not worker.draining:
            self._grant(task_run, ticket, worker, uses)
        elif uses is None or not dispatch.retain(ticket, worker, kind, uses, self._state.now):
            self._state.send(worker.inbox, NoTask(ticket))

    def serve_next(self, ticket: str, worker: Worker, kind: SlotKind, uses: TicketUse) -> None:
        """The worker asks for more under a ticket that it has used already."""
        if uses.exhausted(self._state.now):
            self._state.send(worker.inbox, NoTask(ticket))
        else:
            self.serve(ticket, worker, kind, uses)

    def _grant(self, task_run: str, ticket: str, worker: Worker, uses: TicketUse | None) -> None:
        state = self._state
        run, task = state.find(task_run)
        spec = state.workflow_of(run)
        assert spec is not None
        after = leases.grant(run, task.name, worker.id, worker.inbox, worker.pool, ticket, spec, state.now)
        state.counters.granted(task, state.now, reused=uses is not None)
        state.put(run, after, state.effects())
        state.dispatch.used(ticket, uses.next() if uses is not None else TicketUse(1, state.now))
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

    # --- tickets ----------------------------------------------------------------------------------------------

    def issue_tickets(self) -> list[Publication]:
        """For what has become ready. What can be served under tickets that were kept for it is, and needs none."""
        state = self._state
        for queue, ticket, retained in state.dispatch.to_serve():
            worker = state.workers.get(retained.worker)
            if worker is not None and worker.live(state.now):
                self.serve(ticket, worker, queue.kind, retained.uses)
        issued = [
            Publication(f"pool:{queue.pool}:{queue.kind}", encode_one(Ticket(ticket, self._claim_key, state.shard_key)))
            for queue, ticket in state.dispatch.issue(state.now, self._new_id)
        ]
        state.counters.tickets_issued += len(issued)
        return issued

    def dismiss_retained(self, whose: Callable[[RetainedTicket], bool]) -> None:
        """Let tickets go that were kept."""
        for ticket, retained in self._state.dispatch.dismiss_retained(whose):
            worker = self._state.workers.get(retained.worker)
            if worker is not None:
                self._state.send(worker.inbox, NoTask(ticket))

    def occupancy(self) -> Iterable[tuple[str, SlotKind, int, int]]:
        """For each pool and kind: its slots, and how many of them leases of this shard hold."""
        state = self._state
        running = {(queue.pool, queue.kind): queue.running for queue in state.dispatch}
        for pool in state.workers.pools:
            for kind in SLOT_KINDS:
                capacity = state.workers.capacity(pool, kind, state.now)
                if capacity or (pool, kind) in running:
                    yield pool, kind, capacity, running.get((pool, kind), 0)
