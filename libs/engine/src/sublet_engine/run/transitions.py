"""The transitions of a run: what each message, timeout or loss changes. Pure: ``(run, …, effects) -> run``.

Every function leaves the run settled: each task that can be decided is decided, and a run whose tasks are all done
is finished. A message that does not fit the state (stale, repeated, too late) changes nothing: the function returns
the same object.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import assert_never

from msgspec.structs import replace

from sublet_engine.run import completion, durable_log, leases, results
from sublet_engine.run.effects import Effects, position_at
from sublet_engine.run.state import Run, TaskRun
from sublet_protocol import ids, limits
from sublet_protocol.messages import (
    ChildFinished,
    EventMatched,
    Evicted,
    Failed,
    Finished,
    GrantDeclined,
    Operation,
    Recorded,
    Revoked,
    RunRequest,
    SlotReleased,
    Subscribe,
    TaskError,
    TimeoutExtended,
    TimerFired,
)
from sublet_protocol.raw_json import json_text
from sublet_protocol.specs import EventCondition, TaskSpec, WorkflowSpec

# --- creation -------------------------------------------------------------------------------------------------


def create(request: RunRequest, workflow: WorkflowSpec | None, effects: Effects) -> Run:
    """A new run. A request for an unknown workflow gives a failed run, so that clients can read the reason."""
    links = (request.parent,) if request.parent is not None and request.notify_parent else ()
    run = Run(
        id=request.run_id,
        workflow=request.workflow,
        version=workflow.version if workflow is not None else "",
        input=str(request.input, "utf-8"),
        created_at=_requested_at(request, effects),
        metadata=request.metadata,
        priority=request.priority or (workflow.default_priority if workflow is not None else 1),
        parents=links,
        parent=request.parent,
        child_index=request.child_index,
        child_key=request.child_key,
        trigger=request.trigger,
        watchers=(request.reply_to,) if request.reply_to is not None else (),
    )
    if workflow is None:
        return _finish_unknown(run, effects)
    run = replace(run, tasks=tuple(TaskRun(name=spec.name) for spec in workflow.tasks))
    for spec in workflow.tasks:
        _listen(run, spec, effects, position_at(run.created_at))
    return completion.settle(run, workflow, effects)


def _requested_at(request: RunRequest, effects: Effects) -> float:
    """The start of the run: when it was requested, even if the request was long under way. So a client can request a
    run and then publish the event that the run waits for."""
    return min(request.requested_at or effects.now, effects.now)


def _finish_unknown(run: Run, effects: Effects) -> Run:
    error = TaskError(
        "UnknownWorkflow",
        f"no worker has registered a workflow named {run.workflow!r}; start a worker that has it, "
        "or check the name and the namespace",
    )
    run = replace(run, status="FAILED", error=error, started_at=effects.now, finished_at=effects.now)
    results.announce_end(run, None, effects)
    return run


def _listen(run: Run, spec: TaskSpec, effects: Effects, since: int) -> None:
    """Event conditions of a DAG task listen from the start of the run."""
    for condition in spec.conditions:
        if isinstance(condition, EventCondition):
            effects.arm(run, run.task(spec.name), completion.DAG_WAIT, condition, since)


def add_interest(run: Run, request: RunRequest, workflow: WorkflowSpec | None, effects: Effects) -> Run:
    """The run exists already: add the watcher and the parent of this request, or send them the result if the run has
    ended."""
    if request.reply_to is not None:
        run = watch(run, request.reply_to, workflow, effects)
    if request.parent is None or not request.notify_parent:
        return run
    if run.terminal:
        results.tell_parent(run, request.parent, workflow, effects)
    elif request.parent not in run.parents:
        run = replace(run, parents=(*run.parents, request.parent))
    return run


def watch(run: Run, inbox: str, workflow: WorkflowSpec | None, effects: Effects) -> Run:
    if run.terminal:
        effects.to_inbox(inbox, results.result_of(run, workflow))
        return run
    return run if inbox in run.watchers else replace(run, watchers=(*run.watchers, inbox))


# --- messages about a run ---------------------------------------------------------------------------------------

Report = Finished | Failed | Evicted | Recorded | SlotReleased | TimeoutExtended | GrantDeclined
Fact = TimerFired | EventMatched | ChildFinished


def decide(run: Run, message: Report | Fact, workflow: WorkflowSpec, effects: Effects) -> Run:
    """What a message from a worker, the timer, event-ingest or a child changes."""
    match message:
        case Finished():
            return finish(run, message, workflow, effects)
        case Failed():
            return fail(run, message, workflow, effects)
        case Evicted():
            return evict(run, message, workflow, effects)
        case Recorded():
            return record(run, message, workflow, effects)
        case SlotReleased():
            return leases.release(run, message.lease)
        case TimeoutExtended():
            return leases.extend(run, message.lease, message.by_s, message.number)
        case GrantDeclined():
            return grant_declined(run, message.lease, workflow, effects)
        case TimerFired():
            return timer_fired(run, message, workflow, effects)
        case EventMatched():
            return event_matched(run, message, workflow, effects)
        case ChildFinished():
            return child_finished(run, message, workflow, effects)
        case _:
            assert_never(message)


# --- under a lease --------------------------------------------------------------------------------------------


def finish(run: Run, report: Finished, workflow: WorkflowSpec, effects: Effects) -> Run:
    task = leases.holder(run, report.lease)
    if task is None:
        return run
    output = json_text(report.output)
    return completion.end_task(run, task, "COMPLETED", workflow, effects, output=output)


def fail(run: Run, report: Failed, workflow: WorkflowSpec, effects: Effects) -> Run:
    """The code raised an exception. The task is retried as often as ``retries`` allows; its durable log stays."""
    task = leases.holder(run, report.lease)
    if task is None:
        return run
    return _fail(run, task, report.error, workflow, effects, retryable=report.retryable)


def _fail(
    run: Run, task: TaskRun, error: TaskError, workflow: WorkflowSpec, effects: Effects, *, retryable: bool
) -> Run:
    spec = workflow.task(task.name)
    error = replace(error, task_run_id=run.task_run_id(task))
    if not retryable or task.retries_used >= spec.retries:
        return completion.end_task(run, task, "FAILED", workflow, effects, error=error)
    task = replace(_next_attempt(task), retries_used=task.retries_used + 1, error=error)
    if spec.backoff_factor is None:
        return run.with_task(completion.ready(task, spec, effects.now, resumed=True))
    delay_s = backoff_delay_s(spec, task.retries_used)
    effects.set_timer(run, task, completion.RETRY_WAIT, str(task.retry_count), effects.now + delay_s)
    return run.with_task(replace(task, status="BACKOFF"))


def backoff_delay_s(spec: TaskSpec, retry: int) -> float:
    """``backoff_factor ** retry`` seconds, bounded by the maximum; never overflows."""
    most = spec.backoff_max_s if spec.backoff_max_s is not None else limits.BACKOFF_MAX_S
    factor = spec.backoff_factor if spec.backoff_factor is not None else 1.0
    try:
        return float(min(most, factor**retry))
    except OverflowError:
        return float(most)


def _next_attempt(task: TaskRun) -> TaskRun:
    return replace(
        task,
        lease=None,
        retry_count=task.retry_count + 1,
        active_s=0.0,
        timeout_bonus_s=0.0,
        blocked=(),
    )


def worker_lost(run: Run, lease: str, workflow: WorkflowSpec, effects: Effects) -> Run:
    """The worker is lost, or never received the grant: the task is ready again. This does not use up a retry."""
    task = leases.holder(run, lease)
    if task is None:
        return run
    if task.losses + 1 > limits.MAX_LOSSES:
        error = TaskError(
            "WorkerLost",
            f"lost its worker {limits.MAX_LOSSES + 1} times (last: {task.lease.worker if task.lease else '?'}); "
            "look for crashes and memory limits of the workers of its pool",
            task_run_id=run.task_run_id(task),
        )
        return completion.end_task(run, task, "FAILED", workflow, effects, error=error)
    task = replace(_next_attempt(task), losses=task.losses + 1)
    return run.with_task(_ready_again(task, workflow, effects))


def grant_declined(run: Run, lease: str, workflow: WorkflowSpec, effects: Effects) -> Run:
    """The worker did not start the task: it is ready again, and neither a retry nor a loss is counted."""
    task = leases.holder(run, lease)
    if task is None:
        return run
    return run.with_task(_ready_again(task, workflow, effects))


def _ready_again(task: TaskRun, workflow: WorkflowSpec, effects: Effects) -> TaskRun:
    """The task is ready after it lost its worker. A durable task with a log has no schedule timeout any more, because
    it has started."""
    ready = completion.ready(task, workflow.task(task.name), effects.now, resumed=True)
    return replace(ready, schedule_deadline=None) if task.log_length else ready


def evict(run: Run, report: Evicted, workflow: WorkflowSpec, effects: Effects) -> Run:
    """The checkpoint of a durable task: its lease ends. If a wait has already ended, the task is ready at once. So no
    wake-up can be lost: one decision sees both the checkpoint and the end of the wait."""
    before = leases.holder(run, report.lease)
    if before is None:
        return run
    active_s = before.active_s + report.active_s
    task = replace(before, lease=None, blocked=report.blocked, delivered=report.delivered, active_s=active_s)
    if report.operations:  # the task made progress: the bound is on losses without progress
        task = replace(task, losses=0)
    try:
        task = _record(run, task, report.operations, effects)
    except durable_log.LogFull as full:
        return _log_full(run, before, full, workflow, effects)
    task = replace(task, status="EVICTED", evicted_at=effects.now, waits_for=durable_log.waiting_for(task))
    results.notify(run, task, effects)
    return run.with_task(_wake_if_due(task, workflow, effects))


def _record(run: Run, task: TaskRun, operations: tuple[Operation, ...], effects: Effects) -> TaskRun:
    task = durable_log.record(run, task, operations, effects)
    return durable_log.complete_elapsed_sleeps(run, task, operations, effects)


def _log_full(run: Run, task: TaskRun, full: durable_log.LogFull, workflow: WorkflowSpec, effects: Effects) -> Run:
    """Fail the task because its log is full. ``task``: its state before the message. The effects of this decision so
    far are discarded, and the worker is told to stop."""
    effects.messages.clear()
    effects.log.clear()
    if task.lease is not None:
        effects.to_inbox(task.lease.inbox, Revoked(ids.lease_id(run.task_run_id(task), task.invocation), "superseded"))
    return _fail(run, task, TaskError("LogFull", str(full)), workflow, effects, retryable=False)


def record(run: Run, report: Recorded, workflow: WorkflowSpec, effects: Effects) -> Run:
    """New operations of a task that stays on its worker. Its execution clock stops while every branch waits."""
    before = leases.holder(run, report.lease)
    if before is None or before.lease is None or report.number <= before.reports:
        return run
    task = replace(before, reports=report.number, lease=leases.clock(before.lease, report.waiting, effects.now))
    try:
        task = _record(run, task, report.operations, effects)
    except durable_log.LogFull as full:
        return _log_full(run, before, full, workflow, effects)
    return _after_wait(run, before, task, workflow, effects)


# --- conditions and children ------------------------------------------------------------------------------------------


def timer_fired(run: Run, message: TimerFired, workflow: WorkflowSpec, effects: Effects) -> Run:
    task, operation_id = _waiting_task(run, message)
    if task is None:
        return run
    if operation_id == completion.RETRY_WAIT:
        if task.status != "BACKOFF" or message.key != str(task.retry_count):
            return run
        return run.with_task(completion.ready(task, workflow.task(task.name), effects.now, resumed=True))
    key = message.key
    if operation_id == completion.DAG_WAIT:
        return _condition_met(run, task, key, workflow, effects)
    return _end_wait(
        run, task, lambda: durable_log.meet(run, task, operation_id, key, effects, seq=0), workflow, effects
    )


def event_matched(run: Run, message: EventMatched, workflow: WorkflowSpec, effects: Effects) -> Run:
    task, operation_id = _waiting_task(run, message)
    if task is None:
        return run
    key, seq, payload = message.key, message.seq, message.payload
    if operation_id == completion.DAG_WAIT:
        return _condition_met(run, task, key, workflow, effects)
    return _end_wait(
        run,
        task,
        lambda: durable_log.meet(run, task, operation_id, key, effects, seq=seq, payload=payload),
        workflow,
        effects,
    )


def child_finished(run: Run, message: ChildFinished, workflow: WorkflowSpec, effects: Effects) -> Run:
    task = _named(run, message.task_run_id)
    if task is None or task.terminal:
        return run
    return _end_wait(run, task, lambda: durable_log.child_ended(run, task, message, effects), workflow, effects)


def _condition_met(run: Run, task: TaskRun, key: str, workflow: WorkflowSpec, effects: Effects) -> Run:
    if task.status != "PENDING" or key in task.met:
        return run
    return completion.settle(run.with_task(replace(task, met=(*task.met, key))), workflow, effects)


def _end_wait(run: Run, task: TaskRun, end: Callable[[], TaskRun], workflow: WorkflowSpec, effects: Effects) -> Run:
    """``end`` returns the task after a condition was met or a child has ended; this may close a wait."""
    try:
        after = end()
    except durable_log.LogFull as full:
        return _log_full(run, task, full, workflow, effects)
    return _after_wait(run, task, after, workflow, effects)


def _after_wait(run: Run, before: TaskRun, task: TaskRun, workflow: WorkflowSpec, effects: Effects) -> Run:
    """A wait may have closed: resume an evicted task, or restart the execution clock of a resident one."""
    if task is before:
        return run
    if task.lease is not None and task.completed_count > before.completed_count:
        task = replace(task, lease=leases.clock(task.lease, False, effects.now))
    return run.with_task(_wake_if_due(task, workflow, effects))


def _wake_if_due(task: TaskRun, workflow: WorkflowSpec, effects: Effects) -> TaskRun:
    if task.status == "EVICTED" and durable_log.can_resume(task):
        return replace(
            completion.ready(task, workflow.task(task.name), effects.now, resumed=True), schedule_deadline=None
        )
    return task


def is_waiting_for(task: TaskRun | None, asked: Subscribe) -> bool:
    """The task still waits for the event of this subscription."""
    if task is None or not _still_there(task, asked.operation_id):
        return False
    operation_id = ids.operation_id_of(asked.operation_id)
    if operation_id == completion.DAG_WAIT:
        return task.status == "PENDING" and asked.condition.key not in task.met
    wait = durable_log.open_wait(task, operation_id)
    return wait is not None and all(key != asked.condition.key for key, _ in wait.met)


def _waiting_task(run: Run, message: TimerFired | EventMatched) -> tuple[TaskRun | None, str]:
    """The task that waits for this message, and the operation id of the wait. None if the task has ended or has been
    replayed since."""
    task = _named(run, message.task_run_id)
    if task is not None and not _still_there(task, message.operation_id):
        task = None
    return task, ids.operation_id_of(message.operation_id)


def _still_there(task: TaskRun, wait_key: str) -> bool:
    """The task has neither ended nor been replayed since it waited under this key."""
    return not task.terminal and wait_key == ids.wait_key(ids.operation_id_of(wait_key), task.replays)


def _named(run: Run, task_run: str) -> TaskRun | None:
    name = ids.task_of(task_run)
    return next((task for task in run.tasks if task.name == name), None)


# --- ending from outside --------------------------------------------------------------------------------------


def cancel(run: Run, workflow: WorkflowSpec | None, effects: Effects, *, reason: str = "cancelled") -> Run:
    """Cancel every task that has not ended. A finished run does not change."""
    if run.terminal or workflow is None:
        return run
    run = replace(run, cancelled_reason=reason)
    for task in run.tasks:
        if not task.terminal:
            run = completion.close_task(run, task, "CANCELLED", workflow, effects, reason=reason)
    return completion.settle(run, workflow, effects)


def cancel_task(run: Run, name: str, workflow: WorkflowSpec, effects: Effects, *, reason: str = "cancelled") -> Run:
    task = next((task for task in run.tasks if task.name == name), None)
    if task is None or task.terminal:
        return run
    return completion.end_task(run, task, "CANCELLED", workflow, effects, reason=reason)


def time_out(run: Run, task: TaskRun, workflow: WorkflowSpec, effects: Effects) -> Run:
    """The execution timeout has passed: a failure like any other, and the worker is told to stop."""
    assert task.lease is not None
    spec = workflow.task(task.name)
    lease = ids.lease_id(run.task_run_id(task), task.invocation)
    effects.to_inbox(task.lease.inbox, Revoked(lease, "timed_out"))
    limit_s = spec.execution_timeout_s + task.timeout_bonus_s
    error = TaskError("TimeoutError", f"Task exceeded timeout of {limit_s:g} s")
    return _fail(run, task, error, workflow, effects, retryable=True)


def schedule_time_out(run: Run, task: TaskRun, workflow: WorkflowSpec, effects: Effects) -> Run:
    """No worker had a free slot for the task in time: it is cancelled."""
    timeout_s = workflow.task(task.name).schedule_timeout_s
    reason = f"not started within its schedule timeout of {timeout_s:g} s: no free slot in its pool"
    return completion.end_task(run, task, "CANCELLED", workflow, effects, reason=reason)


def replay(run: Run, workflow: WorkflowSpec, effects: Effects) -> Run:
    """Run a finished run again: the tasks that did not complete and all that depend on them; every task, if all
    completed. Durable logs stay, so recorded operations are not executed again.

    Raises:
        ValueError: the run has not finished; the text says what to do.
    """
    if not run.terminal:
        raise ValueError(f"run {run.id} is {run.status}: only a finished run can be replayed; cancel it first")
    if run.error is not None:
        raise ValueError(f"run {run.id} never started ({run.error.message}); request a new run")
    again = _tasks_to_replay(run, workflow)
    tasks = tuple(_fresh(task) if task.name in again else task for task in run.tasks)
    run = replace(run, tasks=tasks, status="QUEUED", finished_at=None, cancelled_reason=None)
    for spec in workflow.tasks:
        if spec.name in again:
            _listen(run, spec, effects, effects.position)
            durable_log.rearm(run, run.task(spec.name), effects)
    return completion.settle(run, workflow, effects)


def _tasks_to_replay(run: Run, workflow: WorkflowSpec) -> set[str]:
    again = {task.name for task in run.tasks if task.status in ("FAILED", "CANCELLED")}
    if not again:
        again = {task.name for task in run.tasks}
    for spec in workflow.tasks:  # parents come first
        if spec.on_failure or again.intersection(spec.dependencies):
            again.add(spec.name)
    return again


def _fresh(task: TaskRun) -> TaskRun:
    return TaskRun(
        name=task.name,
        retry_count=task.retry_count + 1,
        replays=task.replays + 1,
        invocation=task.invocation,
        open_waits=task.open_waits,
        completed_count=task.completed_count,
        log_length=task.log_length,
        log_bytes=task.log_bytes,
        log_segments=task.log_segments,
    )
