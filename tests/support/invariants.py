"""What must hold for every state of a run, and between any two of its states: for tests and simulations.

Every function raises AssertionError with a sentence that names the task.
"""

from __future__ import annotations

from collections import Counter

from sublet_engine.run import dag, durable_log
from sublet_engine.run.state import OpenWait, Run, TaskRun
from sublet_engine.shard.shard import Shard
from sublet_protocol import limits
from sublet_protocol.specs import TaskSpec, WorkflowSpec


def check(run: Run, workflow: WorkflowSpec | None) -> None:
    """One state. ``workflow`` None: its definition was never known."""
    _check_end(run)
    if workflow is None:
        assert run.terminal, f"run {run.id} goes on without a workflow"
        return
    names = [spec.name for spec in workflow.tasks]
    assert [task.name for task in run.tasks] == names, f"run {run.id} does not have the tasks of its workflow"
    for spec, task in zip(workflow.tasks, run.tasks, strict=True):
        who = f"{run.task_run_id(task)} ({task.status})"
        _check_lease(task, who)
        _check_status(task, who)
        _check_counts(task, spec, who)
        _check_waits(task, spec, who)
        _check_log(task, who)
        if task.status == "PENDING":
            decision, _ = dag.verdict(spec, workflow, run, task)
            assert decision == "wait", f"{who} is still pending although it can be decided: {decision}"


def check_step(before: Run, after: Run, workflow: WorkflowSpec | None) -> None:
    """Two states of one run, the first earlier than the second; whatever happened between them."""
    check(after, workflow)
    for name in ("id", "workflow", "version", "input", "metadata", "created_at", "parent", "trigger"):
        assert getattr(before, name) == getattr(after, name), f"run {before.id} changed its {name}"
    assert after.revision >= before.revision, f"run {before.id} went back to revision {after.revision}"
    assert set(before.watchers) <= set(after.watchers), f"run {before.id} forgot a watcher"
    assert set(before.parents) <= set(after.parents), f"run {before.id} forgot a parent"
    for old, new in zip(before.tasks, after.tasks, strict=True):
        _check_task_step(old, new, before.task_run_id(old))
    if before.terminal and not after.terminal:
        assert _replayed(before, after), f"run {before.id} had ended, and goes on without a replay"


def check_commit(before: Run | None, after: Run, workflow: WorkflowSpec | None) -> None:
    """A state as it is stored, and the stored one that it replaces."""
    revision = before.revision if before is not None else 0
    assert after.revision == revision + 1, f"run {after.id} goes from revision {revision} to {after.revision}"
    if before is None:
        check(after, workflow)
    else:
        check_step(before, after, workflow)


# --- one state ------------------------------------------------------------------------------------------------


def _check_end(run: Run) -> None:
    over = run.error is not None or all(task.terminal for task in run.tasks)
    assert run.terminal == over, f"run {run.id} is {run.status}, its tasks: {[task.status for task in run.tasks]}"
    assert run.terminal == (run.status in ("COMPLETED", "FAILED", "CANCELLED")), (
        f"run {run.id} is {run.status} with an end {run.finished_at}"
    )
    if run.status == "COMPLETED":
        bad = [task.name for task in run.tasks if task.status not in ("COMPLETED", "SKIPPED")]
        assert not bad, f"run {run.id} has completed, but not {bad}"


def _check_lease(task: TaskRun, who: str) -> None:
    assert (task.lease is not None) == (task.status == "RUNNING"), f"{who} has the lease {task.lease}"
    if task.lease is not None:
        assert task.invocation > 0, f"{who} runs without an invocation"
        assert not (task.lease.released and task.lease.ticket), f"{who} has released its slot, but keeps its ticket"
        assert task.lease.active_left_s >= 0, f"{who} has less than no time left"


def _check_status(task: TaskRun, who: str) -> None:
    assert task.terminal == (task.finished_at is not None), f"{who} ended at {task.finished_at}"
    if task.schedule_deadline is not None:
        assert task.status == "READY", f"{who} can miss a schedule deadline although it is not ready"
    if task.status == "READY":
        assert task.ready_at is not None, f"{who} does not know since when"
    if task.blocked:
        assert task.status in ("EVICTED", "READY"), f"{who} is blocked on {task.blocked}"
    if task.status == "EVICTED":
        assert not durable_log.can_resume(task), f"{who} sleeps although it may go on"
    if task.output is not None:
        assert task.status in ("COMPLETED", "SKIPPED"), f"{who} has an output"
    if task.status == "FAILED":
        assert task.error is not None, f"{who} does not say why"


def _check_counts(task: TaskRun, spec: TaskSpec, who: str) -> None:
    assert task.retries_used <= spec.retries, f"{who} used {task.retries_used} of {spec.retries} retries"
    assert task.losses <= limits.MAX_LOSSES, f"{who} was lost {task.losses} times"
    paid = task.retries_used + task.losses
    assert task.retry_count >= paid, f"{who} counts {task.retry_count} attempts after the first, but {paid} are known"


def _check_waits(task: TaskRun, spec: TaskSpec, who: str) -> None:
    operation_ids = [wait.operation_id for wait in task.open_waits]
    assert len(set(operation_ids)) == len(operation_ids), f"{who} waits twice at one node: {operation_ids}"
    if not spec.durable:
        assert task.log_length == 0, f"{who} is not durable and has a log"
    for wait in task.open_waits:
        _check_wait(wait, who)
    asked_for = {operation_id for branch in task.blocked for operation_id in branch}
    ended = len(asked_for.difference(operation_ids))
    assert ended <= task.completed_count, f"{who} is blocked on {sorted(asked_for)}, but it never asked for all of that"


def _check_wait(wait: OpenWait, who: str) -> None:
    where = f"the wait of {who} at {wait.operation_id}"
    assert (wait.child_run_id is None) == bool(wait.groups), f"{where} is neither for a child nor for conditions"
    met = [key for key, _ in wait.met]
    assert len(set(met)) == len(met), f"{where} counts a condition twice: {met}"
    assert set(met) <= {c.key for c in durable_log.conditions_of(wait)}, f"{where} counts a foreign condition: {met}"
    if wait.groups:
        assert not durable_log.complete(wait), f"{where} is over, but open"


def _check_log(task: TaskRun, who: str) -> None:
    least = 2 * task.completed_count + len(task.open_waits)
    assert task.log_length >= least, f"{who} has a log of {task.log_length} entries; its waits alone make {least}"
    firsts = [segment.first for segment in task.log_segments]
    assert firsts == sorted(set(firsts)), f"{who} has log segments out of order: {firsts}"
    assert firsts[:1] == ([0] if task.log_length else []), f"{who} does not know who began its log: {firsts}"
    assert all(first < task.log_length for first in firsts), f"{who} has a log segment beyond its log: {firsts}"


# --- two states -----------------------------------------------------------------------------------------------


def _replayed(before: Run, after: Run) -> bool:
    return any(new.retry_count > old.retry_count for old, new in zip(before.tasks, after.tasks, strict=True))


def _check_task_step(old: TaskRun, new: TaskRun, who: str) -> None:
    if old.terminal and new != old:
        assert new.retry_count > old.retry_count, f"{who} was {old.status} and became {new.status} without a replay"
    for name in ("retry_count", "invocation", "completed_count", "log_length", "log_bytes"):
        was, is_now = getattr(old, name), getattr(new, name)
        assert was <= is_now, f"the {name} of {who} went back from {was} to {is_now}"
    kept = new.log_segments[: len(old.log_segments)]
    assert kept == old.log_segments, f"{who} rewrote its log: {old.log_segments} to {new.log_segments}"
    if old.lease is not None and new.lease is not None and old.invocation == new.invocation:
        assert old.lease.worker == new.lease.worker, f"the lease of {who} went from one worker to another"
        assert old.reports <= new.reports, f"{who} forgot reports that it had applied"
    if old.retry_count == new.retry_count:
        assert set(old.met) <= set(new.met), f"a condition of {who} came true and is not any more"


# --- a shard --------------------------------------------------------------------------------------------------


def check_shard(shard: Shard) -> None:
    """What a shard keeps up as state changes, against a recount."""
    for run in shard.state.runs.values():
        check(run, shard.workflow_of(run))
    tasks = [(run, task) for run in shard.state.runs.values() for task in run.tasks]
    _check_queues(shard, [(run, task) for run, task in tasks if task.status == "READY"])
    _check_leases(shard, [(run, task) for run, task in tasks if task.lease is not None])
    idle = {run.id for run in shard.state.runs.values() if not run.live}
    assert set(shard.state.idle) == idle, f"the idle runs are {sorted(idle)}, not {sorted(shard.state.idle)}"


def _check_queues(shard: Shard, ready: list[tuple[Run, TaskRun]]) -> None:
    found = {run.task_run_id(task) for run, task in ready}
    ready_queues = shard.state.ready
    queued = [task_run for queue in ready_queues for task_run in queue.task_runs()]
    routed = sorted(task_run for task_run in found if ready_queues.pool_of(task_run) is not None)
    assert sorted(queued) == routed, f"the queues hold {sorted(queued)}, but the ready tasks with a pool are {routed}"
    unroutable = found - set(queued)
    misplaced = set(ready_queues.misplaced(shard.state.now))
    assert unroutable <= misplaced <= found, f"ready are {sorted(found)}, but misplaced are {sorted(misplaced)}"
    for queue in shard.state.ready:
        best = queue.best()
        assert (best is not None) == (len(queue) > 0), f"the best of {queue.task_runs()} is {best}"


def _check_leases(shard: Shard, leased: list[tuple[Run, TaskRun]]) -> None:
    running: Counter[tuple[str, str]] = Counter()
    for run, task in leased:
        who, lease = run.task_run_id(task), task.lease
        assert lease is not None
        worker = shard.state.workers.get(lease.worker)
        assert worker is not None, f"{who} runs on {lease.worker}, which the shard does not know"
        assert who in worker.leases, f"{who} runs on {lease.worker}, which does not hold it"
        workflow = shard.workflow_of(run)
        assert workflow is not None
        running[lease.pool, workflow.task(task.name).slot_kind] += not lease.released
    counted = Counter({(queue.pool, queue.kind): queue.running for queue in shard.state.ready})
    assert +counted == +running, f"slots are taken by {dict(+running)}, but counted {dict(counted)}"
    assert min(counted.values(), default=0) >= 0, f"a count went below zero: {dict(counted)}"
    held = {(lease, worker.id) for worker in shard.state.workers for lease in worker.leases}
    expected = {(run.task_run_id(task), task.lease.worker) for run, task in leased if task.lease is not None}
    assert held == expected, f"workers hold {sorted(held)}, the runs say {sorted(expected)}"
    tickets = {run.task_run_id(task): task.lease.ticket for run, task in leased if task.lease is not None}
    for ticket, task_run in shard.state.held_tickets.task_runs().items():
        assert tickets.get(task_run) == ticket, f"ticket {ticket} is taken for that of {task_run}"
    strays = shard.state.held_tickets.counted() - set(shard.state.held_tickets.task_runs())
    assert not strays, f"tickets that nobody holds are still counted: {sorted(strays)}"
