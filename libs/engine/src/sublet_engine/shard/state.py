"""The mutable state of a shard: its runs, definitions and workers, and the indexes of its tasks.

All indexes follow from the runs. A run is changed by `ShardState.put` only, which updates all indexes.
"""

from __future__ import annotations

from collections.abc import Iterable

from sublet_engine.run.effects import Effects
from sublet_engine.run.state import OutgoingMessage, Run, TaskRun
from sublet_engine.shard.counters import ShardCounters
from sublet_engine.shard.deadlines import Deadlines
from sublet_engine.shard.held_tickets import HeldTickets
from sublet_engine.shard.ready_queue import ReadyQueues
from sublet_engine.shard.unit_of_work import Batch, UnitOfWork
from sublet_engine.shard.workers import Workers
from sublet_protocol import ids, limits
from sublet_protocol.destinations import Inbox
from sublet_protocol.messages import Record
from sublet_protocol.specs import WorkflowSpec
from sublet_protocol.topology import run_key


class ShardState:
    """``shard_key``: the routing key of the shard's queue. ``shards``: the number of shards. ``now``: the time of the
    message that is being handled (Unix seconds). ``unit_of_work``: the changes since the last commit."""

    def __init__(self, *, owner_term: str, shard_key: str, shards: int, now: float) -> None:
        self.runs: dict[str, Run] = {}
        self.counters = ShardCounters()
        self.workers = Workers()
        self.ready = ReadyQueues(self.workers)
        self.held_tickets = HeldTickets()
        self.deadlines = Deadlines(self._task)
        self.unit_of_work = UnitOfWork(owner_term, self.runs)
        self.now = now
        self.shard_key, self.shards = shard_key, shards
        self._owner_term = owner_term
        self._workflows: dict[tuple[str, str], WorkflowSpec] = {}
        self._current: dict[str, tuple[float, WorkflowSpec]] = {}
        self._idle: dict[str, None] = {}
        self._completed_at: dict[str, tuple[int, float]] = {}

    # --- runs -------------------------------------------------------------------------------------------------

    def load(self, runs: Iterable[Run]) -> None:
        """Add stored runs. The outbox of a run that another owner wrote may not have been published: publish it."""
        for run in runs:
            if run.id in self.runs:
                continue
            if run.owner_term != self._owner_term:
                self.unit_of_work.republish(run)
            self.runs[run.id] = run
            for task in run.tasks:
                self._index(run, task)
            self._keep(run)

    def put(self, before: Run | None, after: Run, effects: Effects) -> None:
        """Replace ``before`` (None: a new run) by ``after``, and add the effects of this decision."""
        self.unit_of_work.add(after.id, effects)
        if after is before:
            return
        self.unit_of_work.changed(after.id, before)
        self.runs[after.id] = after
        old_tasks: tuple[TaskRun | None, ...] = before.tasks if before is not None else (None,) * len(after.tasks)
        for old, new in zip(old_tasks, after.tasks, strict=True):
            if old is not new:
                self._unindex(after, old)
                self._index(after, new)
                self.counters.changed(old, new)
                self.counters.log_grown(after.task_run_id(new), old, new)
        self.counters.run_changed(before, after)
        self._keep(after)

    def take(self, tickets: list[OutgoingMessage]) -> Batch:
        """The changes since the last call, to be committed."""
        batch = self.unit_of_work.take(tickets)
        for _, run in batch.changes:
            self._keep(run)
        self.deadlines.trim()
        while len(self._idle) > limits.RUN_CACHE_MAX:
            oldest = next(iter(self._idle))
            del self._idle[oldest], self.runs[oldest]
        return batch

    def effects(self) -> Effects:
        return Effects(self.now, self._owner_term)

    def send(self, inbox: str, message: Record) -> None:
        self.unit_of_work.send(Inbox(inbox), message)

    def owns(self, run_id: str) -> bool:
        return run_key(run_id, self.shards) == self.shard_key

    def find(self, task_run: str) -> tuple[Run, TaskRun]:
        """A task run that is ready or has a lease, so that its run is in memory."""
        run = self.runs[ids.run_of(task_run)]
        return run, run.task(ids.task_of(task_run))

    @property
    def idle(self) -> Iterable[str]:
        """Runs without ready or running tasks, which may be dropped from memory; the least recently used first."""
        return self._idle

    def _task(self, run_id: str, name: str) -> TaskRun | None:
        run = self.runs.get(run_id)
        return run.task(name) if run is not None else None

    def _keep(self, run: Run) -> None:
        """Live runs stay in memory; the others are evicted in the order of their last use."""
        self._idle.pop(run.id, None)
        if not run.live:
            self._idle[run.id] = None

    # --- definitions ------------------------------------------------------------------------------------------

    def load_workflow(self, spec: WorkflowSpec, registered_at: float) -> None:
        self._workflows[spec.name, spec.version] = spec
        if registered_at >= self._current.get(spec.name, (0.0, spec))[0]:
            self._current[spec.name] = (registered_at, spec)

    def current(self, name: str) -> WorkflowSpec | None:
        """The latest version of a workflow, which new runs use."""
        known = self._current.get(name)
        return known[1] if known is not None else None

    def is_outdated(self, spec: WorkflowSpec, registered_at: float) -> bool:
        """True if a newer version of this workflow is registered."""
        known = self._current.get(spec.name)
        return known is not None and registered_at < known[0] and (spec.name, spec.version) in self._workflows

    def workflow_of(self, run: Run | None) -> WorkflowSpec | None:
        """The definition in the version of a run; None if it is unknown or there is no run."""
        return self._workflows.get((run.workflow, run.version)) if run is not None else None

    def workflow_needed(self, run: Run | None) -> WorkflowSpec | None:
        """As `workflow_of`, for a message that must not be lost.

        Raises:
            LookupError: the run has not ended, but its definition was saved after this shard was built.
        """
        spec = self.workflow_of(run)
        if run is not None and spec is None and not run.terminal:
            raise LookupError(f"version {run.version} of workflow {run.workflow!r} is needed for run {run.id}")
        return spec

    # --- indexes of tasks ------------------------------------------------------------------------------------

    def completed_long_ago(self, task_run: str) -> bool:
        """The last result was sent to the worker so long ago that it must have arrived."""
        _, at = self._completed_at[task_run]
        return self.now - at > limits.HEARTBEAT_INTERVAL_S

    def route_again(self) -> None:
        """Pools were added or lost: move ready tasks to pools that can run them."""
        for task_run in self.ready.misplaced(self.now):
            run, task = self.find(task_run)
            pool = self.workers.pool_for(f"{run.workflow}:{task.name}", self.now)
            if pool is not None and pool != self.ready.pool_of(task_run):
                self.ready.remove(task_run)
                self._enqueue(run, task)

    def _unindex(self, run: Run, task: TaskRun | None) -> None:
        if task is None:
            return
        task_run = run.task_run_id(task)
        if task.status == "READY":
            self.ready.remove(task_run)
        elif task.lease is not None:
            self.workers.drop_lease(task.lease.worker, task_run)
            spec = self.workflow_of(run)
            if spec is not None:
                self.held_tickets.lease_ended(task_run, task.lease)
                self.ready.lease_ended(task.lease, spec.task(task.name).slot_kind)

    def _index(self, run: Run, task: TaskRun) -> None:
        task_run = run.task_run_id(task)
        spec = self.workflow_of(run)
        if task.status == "READY":
            self._enqueue(run, task)
        elif task.lease is not None:
            lease = task.lease
            self.workers.get_or_add(lease.worker, lease.pool, lease.inbox, self.now).leases.add(task_run)
            if spec is not None:
                self.held_tickets.lease_began(task_run, lease)
                self.ready.lease_began(lease, spec.task(task.name).slot_kind)
        self.deadlines.add(run.id, task)
        if task.completed_count == 0 or task.lease is None:
            self._completed_at.pop(task_run, None)
        elif self._completed_at.get(task_run, (0, 0.0))[0] != task.completed_count:
            self._completed_at[task_run] = (task.completed_count, self.now)

    def _enqueue(self, run: Run, task: TaskRun) -> None:
        spec = self.workflow_of(run)
        if spec is None:
            self.ready.hold_unroutable(run.task_run_id(task))
        else:
            action, kind = f"{run.workflow}:{task.name}", spec.task(task.name).slot_kind
            self.ready.enqueue(run.task_run_id(task), task, run.priority, action, kind, self.now)
