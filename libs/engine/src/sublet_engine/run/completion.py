"""Completion of tasks and runs: each task that can be decided is decided, and a run whose tasks are all done is
finished. Pure: ``(run, …, effects) -> run``."""

from __future__ import annotations

from msgspec.structs import replace

from sublet_engine.run import dag, durable_log, results
from sublet_engine.run.dag import SKIPPED_OUTPUT
from sublet_engine.run.effects import Effects
from sublet_engine.run.state import Run, TaskRun, TaskStatus
from sublet_protocol import ids
from sublet_protocol.messages import Revoked, RunStatus, TaskError
from sublet_protocol.specs import EventCondition, SleepCondition, TaskSpec, WorkflowSpec

DAG_WAIT = "dag"
"""Operation id of the timers and subscriptions that belong to a task's conditions, not to its durable log."""
RETRY_WAIT = "retry"
"""Operation id of the timer for the delay before a retry; its key is the number of the attempt that it starts."""


def settle(run: Run, workflow: WorkflowSpec, effects: Effects) -> Run:
    """Decide every task that can be decided. One pass is enough, because parents come before their children."""
    for spec in workflow.in_order:
        task = run.task(spec.name)
        if task.status == "PENDING":
            run = _decide(run, spec, task, workflow, effects)
    return _finish_if_done(run, workflow, effects)


def _decide(run: Run, spec: TaskSpec, task: TaskRun, workflow: WorkflowSpec, effects: Effects) -> Run:
    if not task.armed and all(run.task(name).terminal for name in spec.dependencies) and not spec.on_failure:
        task = replace(task, armed=True, met=(*task.met, *dag.true_parent_conditions(spec, run)))
        run = run.with_task(task)
        what, why = dag.verdict(spec, workflow, run, task)
        if what == "wait":
            _arm_sleeps(run, task, spec, effects)
    else:
        what, why = dag.verdict(spec, workflow, run, task)
    if what == "wait":
        return run
    if what == "run":
        _withdraw_conditions(run, spec, task, effects)
        return run.with_task(ready(task, spec, effects.now))
    if what == "skip":
        return close_task(run, task, "SKIPPED", workflow, effects, output=SKIPPED_OUTPUT, reason=why)
    return close_task(run, task, "CANCELLED", workflow, effects, reason=why)


def _arm_sleeps(run: Run, task: TaskRun, spec: TaskSpec, effects: Effects) -> None:
    for condition in spec.conditions:
        if isinstance(condition, SleepCondition):
            effects.arm(run, task, DAG_WAIT, condition, 0)


def _withdraw_conditions(run: Run, spec: TaskSpec, task: TaskRun, effects: Effects) -> None:
    for condition in spec.conditions:
        if condition.key not in task.met and (task.armed or isinstance(condition, EventCondition)):
            effects.withdraw(run, task, DAG_WAIT, condition)


def ready(task: TaskRun, spec: TaskSpec, now: float, *, resumed: bool = False) -> TaskRun:
    """The task may run from ``now`` on (Unix seconds)."""
    return replace(
        task,
        status="READY",
        lease=None,
        ready_at=now,
        resumed=resumed,
        schedule_deadline=now + spec.schedule_timeout_s,
        queued_at=task.queued_at if task.queued_at is not None else now,
    )


def end_task(
    run: Run,
    task: TaskRun,
    status: TaskStatus,
    workflow: WorkflowSpec,
    effects: Effects,
    *,
    output: str | None = None,
    error: TaskError | None = None,
    reason: str | None = None,
) -> Run:
    """A task has ended: other tasks may start, or the run may finish."""
    run = close_task(run, task, status, workflow, effects, output=output, error=error, reason=reason)
    return settle(run, workflow, effects)


def close_task(
    run: Run,
    task: TaskRun,
    status: TaskStatus,
    workflow: WorkflowSpec,
    effects: Effects,
    *,
    output: str | None = None,
    error: TaskError | None = None,
    reason: str | None = None,
) -> Run:
    """A task has ended. Its timers and subscriptions are withdrawn, and a worker that still runs it is told to stop.
    The caller must call `settle` for the rest of the run."""
    if task.status == "PENDING":
        _withdraw_conditions(run, workflow.task(task.name), task, effects)
    if task.status == "BACKOFF":
        effects.cancel_timer(run, task, RETRY_WAIT, str(task.retry_count))
    if task.lease is not None and status == "CANCELLED":
        effects.to_inbox(task.lease.inbox, Revoked(ids.lease_id(run.task_run_id(task), task.invocation), "cancelled"))
    durable_log.withdraw_all(run, task, effects)
    task = replace(
        task,
        status=status,
        blocked=(),
        lease=None,
        schedule_deadline=None,
        output=output,
        error=error,
        reason=reason,
        evicted_at=None,
        finished_at=effects.now,
    )
    if status in ("FAILED", "CANCELLED"):
        results.notify(run, task, effects)
    return run.with_task(task)


# --- the end of a run -----------------------------------------------------------------------------------------


def _finish_if_done(run: Run, workflow: WorkflowSpec, effects: Effects) -> Run:
    if run.terminal or not all(task.terminal for task in run.tasks):
        return run
    run = replace(run, status=_final_status(run), finished_at=effects.now)
    results.announce_end(run, workflow, effects)
    return run


def _final_status(run: Run) -> RunStatus:
    statuses = {task.status for task in run.tasks}
    if run.cancelled_reason is not None and "CANCELLED" in statuses:
        return "CANCELLED"
    if "FAILED" in statuses:
        return "FAILED"
    return "CANCELLED" if "CANCELLED" in statuses else "COMPLETED"
