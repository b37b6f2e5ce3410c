"""A shard in memory: its runs, what is ready, who holds which lease, which tickets are out.

All of it is derived, from the stored runs and from what workers say: it can be dropped at any moment and built again.
Nothing here does I/O or reads a clock. Messages and time come in; what a batch of them changed is taken out with
:meth:`Shard.take` and must be committed before the next batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

from msgspec.structs import replace

from sublet_engine import ids, leases, lifecycle, limits, results
from sublet_engine.batch import Batch, Draft, DurableGrant, Publication, Resend, WorkerChange
from sublet_engine.census import Census
from sublet_engine.deadlines import Deadlines
from sublet_engine.dispatch import Dispatch
from sublet_engine.messages import (
    CancelRun,
    ChildFinished,
    Claim,
    EventMatched,
    Extended,
    Failed,
    Finished,
    Goodbye,
    HandedBack,
    Heartbeat,
    Hello,
    NothingToDo,
    Ping,
    Record,
    Recorded,
    RegisterTriggers,
    Released,
    ReplayRun,
    Reply,
    Revoked,
    RunRequest,
    Suspended,
    Tick,
    Ticket,
    TimerFired,
    ToShard,
    WatchRun,
    encode_one,
)
from sublet_engine.queues import Parked, Uses
from sublet_engine.runs import Run, TaskRun
from sublet_engine.turn import Turn
from sublet_engine.workers import Worker, Workers
from sublet_engine.workflows import SLOT_KINDS, SlotKind, WorkflowSpec, topological


class Shard:
    """``claim_key``: where workers send claims. ``slot``: the routing key of this shard's queue. ``first``: this shard
    also speaks for all of them: it registers triggers and saves workers. ``shards``: how many there are."""

    def __init__(
        self,
        *,
        epoch: str,
        claim_key: str,
        slot: str,
        first: bool,
        new_id: Callable[[], str],
        now: float,
        shards: int = ids.HASH_SLOTS,
    ) -> None:
        self.runs: dict[str, Run] = {}
        self.census = Census()
        self.workers = Workers()
        self.dispatch = Dispatch(self.workers, shards)
        self._epoch, self._claim_key, self._slot, self._first = epoch, claim_key, slot, first
        self._shards = shards
        self._new_id, self._now, self._swept_at = new_id, now, now
        self._workflows: dict[tuple[str, str], WorkflowSpec] = {}
        self._current: dict[str, tuple[float, WorkflowSpec]] = {}
        self._draft = Draft(epoch, self.runs)
        self._deadlines = Deadlines(self._task)
        self._idle: dict[str, None] = {}
        self._satisfied_at: dict[str, tuple[int, float]] = {}
        self._ticked_at = now
        self._fresh_since = math.inf
        """What is handled after this was said after the last outage: it came behind the tick that ended it."""
        self._patient_until = now + limits.WORKER_SILENT_S

    def take(self) -> Batch:
        """What has changed since the last call."""
        self._serve_parked()
        batch = self._draft.take(self._issue_tickets())
        for _, run in batch.changes:
            self._keep(run)
        self._trim()
        return batch

    def _trim(self) -> None:
        self._deadlines.trim()
        while len(self._idle) > limits.RUN_CACHE_MAX:
            oldest = next(iter(self._idle))
            del self._idle[oldest], self.runs[oldest]

    def _task(self, run_id: str, name: str) -> TaskRun | None:
        run = self.runs.get(run_id)
        return run.task(name) if run is not None else None

    # --- loading ----------------------------------------------------------------------------------------------

    def load(self, runs: Iterable[Run]) -> None:
        """Runs as stored. What another owner wrote last may not have been published: publish it again."""
        for run in runs:
            if run.id in self.runs:
                continue
            if run.epoch != self._epoch:
                self._draft.publish_again(run)
            self.runs[run.id] = run
            for task in run.tasks:
                self._index_task(run, task)
            self._keep(run)

    def load_workflow(self, spec: WorkflowSpec, registered_at: float) -> None:
        self._workflows[spec.name, spec.version] = spec
        if registered_at >= self._current.get(spec.name, (0.0, spec))[0]:
            self._current[spec.name] = (registered_at, spec)

    def has_workflow(self, name: str) -> bool:
        """In any version."""
        return name in self._current

    def load_pool(self, pool: str, actions: Iterable[str], at: float) -> None:
        """What a pool can run, from an earlier owner's time."""
        self.workers.offer(pool, actions, at)

    def load_worker(
        self,
        worker_id: str,
        pool: str,
        inbox: str,
        slots: dict[SlotKind, int],
        *,
        name: str = "",
        started_at: float = 0.0,
    ) -> None:
        """A worker that an earlier owner knew: taken to live until it has been silent for long enough from now on."""
        worker = self.workers.presume(worker_id, pool, inbox, self._now)
        worker.slots = slots
        worker.name, worker.started_at = name, started_at
        self.dispatch.pool_changed(pool, self._now)

    @staticmethod
    def run_needed(message: ToShard) -> str | None:
        """The run that must be loaded before this message is handled, if it exists."""
        match message:
            case RunRequest() | WatchRun() | CancelRun() | ReplayRun():
                return message.run_id
            case TimerFired() | EventMatched() | ChildFinished():
                return ids.run_of(message.task_run_id)
            case Finished() | Failed() | Suspended() | Recorded() | Released() | Extended() | HandedBack():
                return ids.run_of(message.lease)
            case _:
                return None

    # --- messages ---------------------------------------------------------------------------------------------

    def handle(self, message: ToShard, now: float) -> None:
        """Decide what a message changes. Its run must have been loaded (`run_needed`), if there is one."""
        self._now = max(self._now, now)
        self._draft.asked = self.run_needed(message) is not None
        match message:
            case RunRequest():
                self._requested(message)
            case Finished() | Failed() | Suspended():
                self._ended(message)
            case Recorded() | Released() | Extended() | HandedBack():
                self._happened(message, ids.run_of(message.lease))
            case TimerFired() | EventMatched() | ChildFinished():
                self._happened(message, ids.run_of(message.task_run_id))
            case Claim():
                self._claimed(message)
            case Heartbeat():
                self._heard(message)
            case Hello():
                self._greeted(message)
            case Goodbye():
                self._left(message.worker)
            case Tick():
                self._ticked(message.at)
            case WatchRun():
                self._watched(message)
            case CancelRun():
                self._cancelled(message)
            case ReplayRun():
                self._replayed(message)

    def _requested(self, message: RunRequest) -> None:
        if "." in message.run_id:
            raise ValueError(f"run id {message.run_id!r} contains a dot: task run ids would be ambiguous")
        turn = self._turn()
        run = self.runs.get(message.run_id)
        if run is None:
            current = self._current.get(message.workflow)
            self._put(None, lifecycle.create(message, current[1] if current else None, turn), turn)
        else:
            self._put(run, lifecycle.add_interest(run, message, self.workflow_of(run), turn), turn)

    def _watched(self, message: WatchRun) -> None:
        run = self.runs.get(message.run_id)
        turn = self._turn()
        if run is None:
            self._send(message.reply_to, results.no_such_run(message.run_id))
            return
        self._put(run, lifecycle.watch(run, message.reply_to, self.workflow_of(run), turn), turn)

    def _cancelled(self, message: CancelRun) -> None:
        run = self.runs.get(message.run_id)
        turn, error = self._turn(), None
        spec = self._workflow_needed(run)
        if run is None:
            error = f"there is no run {message.run_id}"
        elif spec is not None and message.task_run_id is not None:
            after = lifecycle.cancel_task(run, ids.task_of(message.task_run_id), spec, turn)
            self._put(run, after, turn)
        else:
            self._put(run, lifecycle.cancel(run, spec, turn), turn)
        self._reply(message.reply_to, message.correlation_id, error)

    def _replayed(self, message: ReplayRun) -> None:
        run = self.runs.get(message.run_id)
        spec = self.workflow_of(run)
        turn, error = self._turn(), None
        if run is None:
            error = f"there is no run {message.run_id}"
        elif spec is None:
            error = f"workflow {run.workflow!r} in version {run.version or '?'} is not known any more"
        elif message.correlation_id is None or message.correlation_id != run.replayed_by:
            try:
                after = lifecycle.replay(run, spec, turn)
                self._put(run, replace(after, replayed_by=message.correlation_id), turn)
            except ValueError as refused:
                error = str(refused)
        self._reply(message.reply_to, message.correlation_id, error)

    # --- reports ----------------------------------------------------------------------------------------------

    def _ended(self, report: Finished | Failed | Suspended) -> None:
        """A report that ends a lease, and perhaps asks for the next task under the same ticket."""
        run = self.runs.get(ids.run_of(report.lease))
        spec = self._workflow_needed(run)
        task = leases.holder(run, report.lease) if run is not None else None
        if run is None or spec is None or task is None or task.lease is None:
            self.census.stale_reports += 1
            return  # its worker asks again for the ticket, with a claim
        turn = self._turn()
        after = lifecycle.decide(run, report, spec, turn)
        lease = task.lease
        worker = self.workers.add(lease.worker, lease.pool, lease.inbox, self._now)
        uses = self.dispatch.uses(lease)
        self._put(run, after, turn)
        if report.ticket is None or not report.next:
            return
        if uses.spent(self._now):
            self._send(worker.inbox, NothingToDo(report.ticket))
        else:
            self._serve(report.ticket, worker, spec.task(task.name).slot_kind, uses)

    def _happened(self, message: lifecycle.Report | lifecycle.Fact, run_id: str) -> None:
        """Something that changes a run, and answers nobody."""
        run = self.runs.get(run_id)
        spec = self._workflow_needed(run)
        if run is None or spec is None:
            self.census.stale_reports += 1
            return
        turn = self._turn()
        self._put(run, lifecycle.decide(run, message, spec, turn), turn)

    # --- tickets, claims, grants ------------------------------------------------------------------------------

    def _claimed(self, claim: Claim) -> None:
        """A worker has room. The claim decides, whatever the ticket was issued for."""
        if self.workers.get(claim.worker) is None:
            self._send(claim.inbox, Ping(hello=not self.workers.known(claim.pool)))
        worker = self.workers.add(claim.worker, claim.pool, claim.inbox, self._now)
        self.dispatch.claimed(claim.ticket, claim.pool, claim.kind)
        held = self.dispatch.holder(claim.ticket)
        if held is not None and self._is_held_by(held, claim.worker):
            if not (claim.redelivered and self._lease_of(held) in worker.listed):
                self._grant_again(held)
                return
            # The ticket came again, for another task: what was granted under it runs on without one.
        elif held is not None:
            self._doubt_holder(held)
        self._serve(claim.ticket, worker, claim.kind)

    def _lease_of(self, task_run: str) -> str:
        return ids.lease_id(task_run, self.runs[ids.run_of(task_run)].task(ids.task_of(task_run)).invocation)

    def _is_held_by(self, task_run: str, worker: str) -> bool:
        lease = self.runs[ids.run_of(task_run)].task(ids.task_of(task_run)).lease
        return lease is not None and lease.worker == worker

    def _grant_again(self, task_run: str) -> None:
        """The grant got lost, or crossed with a repeated claim: the same lease, the same grant."""
        run = self.runs[ids.run_of(task_run)]
        self._send_grant(run, run.task(ids.task_of(task_run)))

    def _doubt_holder(self, task_run: str) -> None:
        """A ticket came back although a lease stands on it: its worker's connection broke, or it is dead."""
        lease = self.runs[ids.run_of(task_run)].task(ids.task_of(task_run)).lease
        assert lease is not None
        holder = self.workers.presume(lease.worker, lease.pool, lease.inbox, self._now)
        if holder.suspected_at is None:
            holder.suspected_at = self._now
            self._send(lease.inbox, Ping())

    def _serve(self, ticket: str, worker: Worker, kind: SlotKind, uses: Uses | None = None) -> None:
        """Grant the best ready task under this ticket, or let the ticket go. ``uses``: how it was used before."""
        task_run = self.dispatch.queue(worker.pool, kind).best()
        if task_run is not None and not worker.draining:
            self._grant(task_run, ticket, worker, uses)
        elif uses is None or not self.dispatch.park(ticket, worker, kind, uses, self._now):
            self._send(worker.inbox, NothingToDo(ticket))

    def _grant(self, task_run: str, ticket: str, worker: Worker, uses: Uses | None) -> None:
        run = self.runs[ids.run_of(task_run)]
        spec = self.workflow_of(run)
        assert spec is not None
        task = run.task(ids.task_of(task_run))
        after = leases.grant(run, task.name, worker.id, worker.inbox, worker.pool, ticket, spec, self._now)
        self.census.granted(task, self._now, reused=uses is not None)
        self._put(run, after, self._turn())
        self.dispatch.used(ticket, uses.another() if uses is not None else Uses(1, self._now))
        self._send_grant(after, after.task(task.name))

    def _serve_parked(self) -> None:
        """What has become ready in this batch goes to workers whose tickets were kept for it."""
        for queue, ticket, parked in self.dispatch.to_serve():
            worker = self.workers.get(parked.worker)
            if worker is not None and worker.live(self._now):
                self._serve(ticket, worker, queue.kind, parked.uses)

    def _unpark(self, whose: Callable[[Parked], bool]) -> None:
        for ticket, parked in self.dispatch.unpark(whose):
            worker = self.workers.get(parked.worker)
            if worker is not None:
                self._send(worker.inbox, NothingToDo(ticket))

    def _send_grant(self, run: Run, task: TaskRun) -> None:
        spec = self.workflow_of(run)
        lease = task.lease
        assert spec is not None
        assert lease is not None
        grant = leases.grant_message(run, task, spec, self._now, scheduler=self._claim_key, shards=self._shards)
        if task.log_length:
            self._draft.durable_grants.append(DurableGrant(lease.inbox, grant, task, run.task_run_id(task)))
        else:
            self._send(lease.inbox, grant)

    def _issue_tickets(self) -> list[Publication]:
        issued = [
            Publication(f"pool:{queue.pool}:{queue.kind}", encode_one(Ticket(ticket, self._claim_key, self._slot)))
            for queue, ticket in self.dispatch.issue(self._now, self._new_id)
        ]
        self.census.tickets_issued += len(issued)
        return issued

    def occupancy(self) -> Iterable[tuple[str, SlotKind, int, int]]:
        """For each pool and kind: its slots, and how many of them leases of this shard hold."""
        running = {(queue.pool, queue.kind): queue.running for queue in self.dispatch}
        for pool in self.workers.pools:
            for kind in SLOT_KINDS:
                capacity = self.workers.capacity(pool, kind, self._now)
                if capacity or (pool, kind) in running:
                    yield pool, kind, capacity, running.get((pool, kind), 0)

    # --- workers ----------------------------------------------------------------------------------------------

    def _greeted(self, hello: Hello) -> None:
        for spec in hello.workflows:
            spec = replace(spec, tasks=topological(spec.tasks))
            known = self._current.get(spec.name)
            if known is not None and hello.at < known[0] and (spec.name, spec.version) in self._workflows:
                continue
            self.load_workflow(spec, hello.at)
            self._draft.workflows[spec.name, spec.version] = (spec, hello.at)
            if self._first:
                triggers = RegisterTriggers(spec.name, spec.on_events, spec.default_filters, hello.at)
                self._draft.send("ingest", triggers, durable=True)
        worker = self.workers.add(hello.worker, hello.pool, hello.inbox, self._now)
        worker.slots = {"task": hello.slots, "durable": hello.durable_slots}
        worker.name, worker.started_at = hello.name, hello.at
        self.workers.offer(hello.pool, hello.actions, hello.at)
        self._save_worker(worker)
        self._route_again()
        self.dispatch.pool_changed(hello.pool, self._now)

    def _heard(self, beat: Heartbeat) -> None:
        worker = self.workers.get(beat.worker)
        if worker is None:
            worker = self.workers.add(beat.worker, beat.pool, beat.inbox, self._now)
            if not self.workers.known(beat.pool):
                self._send(beat.inbox, Ping(hello=True))
        worker.seen(self._now)
        worker.inbox, worker.draining = beat.inbox, beat.draining
        worker.slots = {"task": beat.slots, "durable": beat.durable_slots}
        worker.taken = {"task": beat.taken, "durable": beat.durable_taken}
        self.dispatch.pool_changed(beat.pool, self._now)
        if worker.draining:
            self._unpark(lambda parked: parked.worker == worker.id)
        if self._now - worker.saved_at > limits.WORKER_SAVE_INTERVAL_S:
            self._save_worker(worker)
        self._compare_leases(worker, {held.lease: held.delivered for held in beat.leases})

    def _compare_leases(self, worker: Worker, held: dict[str, int]) -> None:
        """What the worker holds against what it should: ended leases are revoked, grants that never came are lost, and
        results that a resident task missed are sent again."""
        for lease in held:
            run_id = ids.run_of(lease)
            run = self.runs.get(run_id)  # one that is not here has no lease, if it is ours
            if self._owns(run_id) and (run is None or leases.holder(run, lease) is None):
                self._send(worker.inbox, Revoked(lease, "superseded"))
        unlisted, worker.unlisted = worker.unlisted, {}
        for task_run in sorted(worker.leases):
            run = self.runs[ids.run_of(task_run)]
            task = run.task(ids.task_of(task_run))
            lease = ids.lease_id(task_run, task.invocation)
            if lease not in held:
                worker.unlisted[lease] = unlisted.get(lease, self._now)
                if self._now - worker.unlisted[lease] > limits.GRANT_UNSEEN_S:
                    self.census.finding("grant_unseen", lease)
                    self._lose(run, lease)
            elif 0 <= held[lease] < task.satisfied and self._settled_for(task_run):
                self.census.finding("result_unseen", lease)
                self._draft.resends.append(Resend(worker.inbox, lease, task, held[lease]))
        worker.listed = frozenset(held)

    def _owns(self, run_id: str) -> bool:
        return ids.slot_key(run_id, self._shards) == self._slot

    def _settled_for(self, task_run: str) -> bool:
        """The last result went out so long ago that it must have arrived."""
        _, at = self._satisfied_at[task_run]
        return self._now - at > limits.HEARTBEAT_INTERVAL_S

    def _left(self, worker_id: str) -> None:
        worker = self.workers.get(worker_id)
        if worker is not None:
            self._lose_all(worker)

    def _save_worker(self, worker: Worker, *, gone: bool = False) -> None:
        if self._first:
            worker.saved_at = self._now
            self._draft.workers.append(WorkerChange(worker, self.workers.actions(worker.pool), gone))

    def _lose_all(self, worker: Worker) -> None:
        self.workers.remove(worker.id)
        self._save_worker(worker, gone=True)
        for task_run in sorted(worker.leases):
            run = self.runs[ids.run_of(task_run)]
            self._lose(run, ids.lease_id(task_run, run.task(ids.task_of(task_run)).invocation))
        self._route_again()

    def _lose(self, run: Run, lease: str) -> None:
        spec = self.workflow_of(run)
        assert spec is not None
        turn = self._turn()
        self.census.leases_lost += 1
        self._put(run, lifecycle.lose(run, lease, spec, turn), turn)

    # --- time -------------------------------------------------------------------------------------------------

    def _ticked(self, at: float) -> None:
        """Time passes as the queue knows it. What arrived before this tick has been handled, so a worker or a report
        is never late because we were.

        After an outage, and at first, nobody is blamed for a while: what was said meanwhile is on its way.
        """
        at = min(at, self._now)
        if at - self._ticked_at > limits.WORKER_SILENT_S:
            self._patient_until = self._now + limits.WORKER_SILENT_S
            self._fresh_since = self._now
            self.workers.excuse(self._now)
        self._fresh_since = min(self._fresh_since, self._now)
        self._ticked_at = max(self._ticked_at, at)
        if at >= self._patient_until:
            self._strike_deadlines(at)
        for worker in self.workers.lost(at):
            self._lose_all(worker)
        self._unpark(lambda parked: parked.since <= self._now - limits.TICKET_PARKED_S)
        if self._now - self._swept_at >= limits.SWEEP_INTERVAL_S:
            self._swept_at = self._now
            self._sweep()

    def _strike_deadlines(self, at: float) -> None:
        for run_id, task in self._deadlines.strike(at, self._slow_or_dead):
            run = self.runs[run_id]
            spec = self.workflow_of(run)
            assert spec is not None
            turn = self._turn()
            strike = lifecycle.time_out if task.lease is not None else lifecycle.schedule_time_out
            self._put(run, strike(run, task, spec, turn), turn)

    def _slow_or_dead(self, task: TaskRun, deadline: float) -> bool:
        """Not clear yet: its worker has not been heard since, but for what may be the last words of the dead, which an
        outage delayed. It speaks soon, or is lost."""
        if task.lease is None:
            return False
        worker = self.workers.get(task.lease.worker)
        return worker is None or worker.last_seen < deadline or worker.last_seen <= self._fresh_since

    def _sweep(self) -> None:
        """Find what no message told: tickets that got lost, ready tasks of pools that are gone."""
        lost = self.dispatch.forget_lost_tickets(self._now)
        if lost:
            self.census.finding("ticket_lost", *lost)
        self._route_again()

    # --- state and its indexes --------------------------------------------------------------------------------

    def _turn(self) -> Turn:
        return Turn(self._now, self._epoch)

    def workflow_of(self, run: Run | None) -> WorkflowSpec | None:
        """The definition that a run began with; None if it was never known, or there is no run."""
        return self._workflows.get((run.workflow, run.version)) if run is not None else None

    def _workflow_needed(self, run: Run | None) -> WorkflowSpec | None:
        """As `workflow_of`, for a message that must not be lost.

        Raises:
            LookupError: the run goes on, but its definition is not here: it was saved after this shard was built.
        """
        spec = self.workflow_of(run)
        if run is not None and spec is None and not run.terminal:
            raise LookupError(f"version {run.version} of workflow {run.workflow!r} is needed for run {run.id}")
        return spec

    def _put(self, before: Run | None, after: Run, turn: Turn) -> None:
        """Take over what a decision gave."""
        self._draft.add(after.id, turn)
        if after is before:
            return
        self._draft.changed(after.id, before)
        self.runs[after.id] = after
        self._reindex(before, after)

    def _send(self, inbox: str, message: Record) -> None:
        self._draft.send(f"inbox:{inbox}", message)

    def _reply(self, inbox: str | None, correlation_id: str | None, error: str | None) -> None:
        if inbox is not None and correlation_id is not None:
            self._send(inbox, Reply(correlation_id, error=error))

    def _reindex(self, before: Run | None, after: Run) -> None:
        old_tasks: tuple[TaskRun | None, ...] = before.tasks if before is not None else (None,) * len(after.tasks)
        for old, new in zip(old_tasks, after.tasks, strict=True):
            if old is not new:
                self._unindex_task(after, old)
                self._index_task(after, new)
                self.census.changed(old, new)
        self.census.run_changed(before, after)
        self._keep(after)

    def _keep(self, run: Run) -> None:
        """Live runs stay in memory; the others as long as there is room, the last used longest."""
        self._idle.pop(run.id, None)
        if not run.live:
            self._idle[run.id] = None

    def _unindex_task(self, run: Run, task: TaskRun | None) -> None:
        if task is None:
            return
        task_run = run.task_run_id(task)
        if task.status == "READY":
            self.dispatch.remove(task_run)
        elif task.lease is not None:
            self.workers.drop_lease(task.lease.worker, task_run)
            spec = self.workflow_of(run)
            if spec is not None:
                self.dispatch.end(task_run, task.lease, spec.task(task.name).slot_kind)

    def _index_task(self, run: Run, task: TaskRun) -> None:
        task_run = run.task_run_id(task)
        spec = self.workflow_of(run)
        if task.status == "READY":
            self._place(run, task)
        elif task.lease is not None:
            lease = task.lease
            self.workers.presume(lease.worker, lease.pool, lease.inbox, self._now).leases.add(task_run)
            if spec is not None:
                self.dispatch.begin(task_run, lease, spec.task(task.name).slot_kind)
        self._deadlines.add(run.id, task)
        if task.satisfied == 0 or task.lease is None:
            self._satisfied_at.pop(task_run, None)
        elif self._satisfied_at.get(task_run, (0, 0.0))[0] != task.satisfied:
            self._satisfied_at[task_run] = (task.satisfied, self._now)

    def _place(self, run: Run, task: TaskRun) -> None:
        spec = self.workflow_of(run)
        if spec is None:
            self.dispatch.set_aside(run.task_run_id(task))
        else:
            action, kind = f"{run.workflow}:{task.name}", spec.task(task.name).slot_kind
            self.dispatch.place(run.task_run_id(task), task, run.priority, action, kind, self._now)

    def _route_again(self) -> None:
        """Pools have come or gone: move ready tasks to where they can run."""
        for task_run in self.dispatch.displaced(self._now):
            run = self.runs[ids.run_of(task_run)]
            name = ids.task_of(task_run)
            pool = self.workers.pool_for(f"{run.workflow}:{name}", self._now)
            if pool is not None and pool != self.dispatch.stands_at(task_run):
                self.dispatch.remove(task_run)
                self._place(run, run.task(name))
