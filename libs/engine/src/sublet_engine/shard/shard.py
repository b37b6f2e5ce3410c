"""A shard in memory: each message is passed to the decision that it needs.

A shard consists of three objects. `ShardState` owns the runs, the workers and everything that follows from them; the
other two read and change them only there. `Tickets` owns the tickets that are issued or retained, and makes grants.
`Liveness` owns the times of ticks and sweeps, and handles workers and deadlines.

All of it is derived from the stored runs and from messages of workers, so it can be dropped at any moment and built
again. Nothing here does I/O or reads a clock. The caller passes messages with their time, takes the changes of a batch
with :meth:`Shard.take`, and must commit them before the next batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import assert_never

from msgspec.structs import replace

from sublet_engine.run import leases, results, transitions
from sublet_engine.run.state import Run
from sublet_engine.shard.liveness import Liveness
from sublet_engine.shard.state import ShardState
from sublet_engine.shard.tickets import Tickets
from sublet_engine.shard.unit_of_work import Batch
from sublet_protocol import ids
from sublet_protocol.messages import (
    CancelRun,
    ChildFinished,
    Claim,
    EventMatched,
    Evicted,
    Failed,
    Finished,
    Goodbye,
    GrantDeclined,
    Heartbeat,
    Hello,
    Recorded,
    ReplayRun,
    Reply,
    RunRequest,
    ShardMessage,
    SlotReleased,
    Tick,
    TimeoutExtended,
    TimerFired,
    WatchRun,
)
from sublet_protocol.specs import SlotKind, WorkflowSpec


class Shard:
    """``claim_key``: the routing key of claims. ``shard_key``: the routing key of this shard's queue. ``first``: this
    shard also acts for all shards: it registers triggers and saves workers. ``shards``: the number of shards."""

    def __init__(
        self,
        *,
        owner_term: str,
        claim_key: str,
        shard_key: str,
        first: bool,
        new_id: Callable[[], str],
        now: float,
        shards: int = ids.BUCKETS,
    ) -> None:
        self.state = ShardState(owner_term=owner_term, shard_key=shard_key, shards=shards, now=now)
        self.tickets = Tickets(self.state, claim_key, new_id)
        self._liveness = Liveness(self.state, self.tickets, first=first)

    def take(self) -> Batch:
        """The changes since the last call, to be committed."""
        return self.state.take(self.tickets.issue())

    def occupancy(self) -> Iterable[tuple[str, SlotKind, int, int]]:
        """For each pool and kind: its slots, and how many of them leases of this shard hold."""
        return self.tickets.occupancy()

    # --- loading ----------------------------------------------------------------------------------------------

    def load(self, runs: Iterable[Run]) -> None:
        """Add stored runs. The outbox of a run that another owner wrote is published again."""
        self.state.load(runs)

    def load_workflow(self, spec: WorkflowSpec, registered_at: float) -> None:
        self.state.load_workflow(spec, registered_at)

    def has_workflow(self, name: str) -> bool:
        """The workflow is known in any version."""
        return self.state.current(name) is not None

    def workflow_of(self, run: Run | None) -> WorkflowSpec | None:
        """The definition in the version of a run; None if it is unknown or there is no run."""
        return self.state.workflow_of(run)

    def load_pool(self, pool: str, actions: Iterable[str], at: float) -> None:
        """A stored pool: it can run these actions since ``at`` (Unix seconds)."""
        self.state.workers.offer(pool, actions, at)

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
        """A stored worker. It counts as live until it has been silent for too long from now on."""
        worker = self.state.workers.get_or_add(worker_id, pool, inbox, self.state.now)
        worker.slots = slots
        worker.name, worker.started_at = name, started_at
        self.tickets.pool_changed(pool)

    @staticmethod
    def run_needed(message: ShardMessage) -> str | None:
        """The run that must be loaded before this message is handled, if it exists."""
        match message:
            case RunRequest() | WatchRun() | CancelRun() | ReplayRun():
                return message.run_id
            case TimerFired() | EventMatched() | ChildFinished():
                return ids.run_of(message.task_run_id)
            case Finished() | Failed() | Evicted() | Recorded() | SlotReleased() | TimeoutExtended() | GrantDeclined():
                return ids.run_of(message.lease)
            case Claim() | Heartbeat() | Hello() | Goodbye() | Tick():
                return None
            case _:
                assert_never(message)

    # --- messages ---------------------------------------------------------------------------------------------

    def handle(self, message: ShardMessage, now: float) -> None:
        """Decide what a message changes. ``now``: Unix seconds. The run of `run_needed` must be loaded."""
        self.state.now = max(self.state.now, now)
        self.state.unit_of_work.is_repeatable = self.run_needed(message) is not None
        match message:
            case RunRequest():
                self._requested(message)
            case Finished() | Failed() | Evicted():
                self._ended(message)
            case Recorded() | SlotReleased() | TimeoutExtended() | GrantDeclined():
                self._happened(message, ids.run_of(message.lease))
            case TimerFired() | EventMatched() | ChildFinished():
                self._happened(message, ids.run_of(message.task_run_id))
            case Claim():
                self.tickets.claimed(message)
            case Heartbeat():
                self._liveness.on_heartbeat(message)
            case Hello():
                self._liveness.on_hello(message)
            case Goodbye():
                self._liveness.on_goodbye(message.worker)
            case Tick():
                self._liveness.on_tick(message.at)
            case WatchRun():
                self._watched(message)
            case CancelRun():
                self._cancelled(message)
            case ReplayRun():
                self._replayed(message)
            case _:
                assert_never(message)

    # --- requests of clients ---------------------------------------------------------------------------------

    def _requested(self, message: RunRequest) -> None:
        if "." in message.run_id:
            raise ValueError(f"run id {message.run_id!r} contains a dot: task run ids would be ambiguous")
        state = self.state
        effects = state.effects()
        run = self.state.runs.get(message.run_id)
        if run is None:
            after = transitions.create(message, state.current(message.workflow), effects)
        else:
            after = transitions.add_interest(run, message, state.workflow_of(run), effects)
        state.put(run, after, effects)

    def _watched(self, message: WatchRun) -> None:
        state = self.state
        run = self.state.runs.get(message.run_id)
        if run is None:
            state.send(message.reply_to, results.no_such_run(message.run_id))
            return
        effects = state.effects()
        state.put(run, transitions.watch(run, message.reply_to, state.workflow_of(run), effects), effects)

    def _cancelled(self, message: CancelRun) -> None:
        state = self.state
        run = self.state.runs.get(message.run_id)
        spec = state.workflow_needed(run)
        effects, error = state.effects(), None
        if run is None:
            error = f"there is no run {message.run_id}"
        elif spec is not None and message.task_run_id is not None:
            state.put(run, transitions.cancel_task(run, ids.task_of(message.task_run_id), spec, effects), effects)
        else:
            state.put(run, transitions.cancel(run, spec, effects), effects)
        self._reply(message.reply_to, message.correlation_id, error)

    def _replayed(self, message: ReplayRun) -> None:
        state = self.state
        run = self.state.runs.get(message.run_id)
        spec = state.workflow_of(run)
        effects, error = state.effects(), None
        if run is None:
            error = f"there is no run {message.run_id}"
        elif spec is None:
            error = f"workflow {run.workflow!r} in version {run.version or '?'} is unknown"
        elif message.correlation_id is None or message.correlation_id != run.replayed_by:
            try:
                after = transitions.replay(run, spec, effects)
                state.put(run, replace(after, replayed_by=message.correlation_id), effects)
            except ValueError as refused:
                error = str(refused)
        self._reply(message.reply_to, message.correlation_id, error)

    def _reply(self, inbox: str | None, correlation_id: str | None, error: str | None) -> None:
        if inbox is not None and correlation_id is not None:
            self.state.send(inbox, Reply(correlation_id, error=error))

    # --- reports and facts about runs ---------------------------------------------------------------------------------

    def _ended(self, report: Finished | Failed | Evicted) -> None:
        """A report that ends a lease and may ask for the next task under the same ticket."""
        state = self.state
        run = self.state.runs.get(ids.run_of(report.lease))
        spec = state.workflow_needed(run)
        task = leases.holder(run, report.lease) if run is not None else None
        if run is None or spec is None or task is None or task.lease is None:
            state.counters.stale_reports += 1
            return  # the worker repeats its request for the ticket with a claim
        effects, lease = state.effects(), task.lease
        after = transitions.decide(run, report, spec, effects)
        worker = state.workers.add(lease.worker, lease.pool, lease.inbox, state.now)
        use = state.held_tickets.use_of(lease)
        state.put(run, after, effects)
        if report.ticket is not None and report.next:
            self.tickets.serve_next(report.ticket, worker, spec.task(task.name).slot_kind, use)

    def _happened(self, message: transitions.Report | transitions.Fact, run_id: str) -> None:
        """A report or fact that changes a run and has no answer."""
        state = self.state
        run = self.state.runs.get(run_id)
        spec = state.workflow_needed(run)
        if run is None or spec is None:
            state.counters.stale_reports += 1
            return
        effects = state.effects()
        state.put(run, transitions.decide(run, message, spec, effects), effects)
