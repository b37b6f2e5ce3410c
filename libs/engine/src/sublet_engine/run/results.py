"""Results of runs for clients and parents, and notices about tasks."""

from __future__ import annotations

import msgspec

from sublet_engine.run.effects import Effects
from sublet_engine.run.state import Run, TaskRun
from sublet_protocol import ids
from sublet_protocol.messages import ChildFinished, ParentLink, RunResult, TaskError, TaskNotice
from sublet_protocol.raw_json import NULL, raw_json
from sublet_protocol.specs import WorkflowSpec


def announce_end(run: Run, workflow: WorkflowSpec | None, effects: Effects) -> None:
    result = result_of(run, workflow)
    for inbox in run.watchers:
        effects.to_inbox(inbox, result, durable=True)
    for link in run.parents:
        tell_parent(run, link, workflow, effects)
    effects.notify(f"run.{run.status.lower()}.{run.workflow}", result)


def result_of(run: Run, workflow: WorkflowSpec | None) -> RunResult:
    """The result as clients get it. Skipped on-failure tasks are left out."""
    extras = {spec.name for spec in workflow.tasks if spec.on_failure} if workflow is not None else set()
    outputs = {
        task.name: raw_json(task.output)
        for task in run.tasks
        if task.status in ("COMPLETED", "SKIPPED") and not (task.name in extras and task.status == "SKIPPED")
    }
    errors = tuple(task.error for task in run.tasks if task.status == "FAILED" and task.error is not None)
    if run.error is not None:
        errors = (run.error,)
    reasons = (f"{task.name}: {task.reason}" for task in run.tasks if task.status == "CANCELLED" and task.reason)
    reason = run.cancelled_reason or next(reasons, None) if run.status == "CANCELLED" else None
    return RunResult(run.id, run.status, outputs, errors, reason)


def tell_parent(run: Run, link: ParentLink, workflow: WorkflowSpec | None, effects: Effects) -> None:
    result = result_of(run, workflow)
    output, error = NULL, None
    if run.status == "COMPLETED":
        output = _output_for_parent(result, workflow)
    else:
        error = _error_for_parent(run, result)
    ended = ChildFinished(link.task_run_id, link.operation_id, run.id, run.status, output, error, run.finished_at)
    effects.to_run(ids.run_of(link.task_run_id), ended)


def _output_for_parent(result: RunResult, workflow: WorkflowSpec | None) -> msgspec.Raw:
    """The output of the task for a workflow of one task, else an object with the outputs by task name."""
    if workflow is not None and sum(not spec.on_failure for spec in workflow.tasks) == 1:
        return next(iter(result.outputs.values()), NULL)
    return msgspec.Raw(msgspec.json.encode(result.outputs))


def _error_for_parent(run: Run, result: RunResult) -> TaskError:
    if result.errors:
        return result.errors[0]
    return TaskError("ChildCancelled", f"child run {run.id} ({run.workflow}) was cancelled: {result.cancelled_reason}")


def notify(run: Run, task: TaskRun, effects: Effects) -> None:
    """Publish the new state of a task on ``sublet.notices``."""
    notice = TaskNotice(run.id, run.task_run_id(task), run.workflow, task.name, task.status, effects.now, task.reason)
    effects.notify(f"task.{task.status.lower()}.{run.workflow}.{task.name}", notice)


def no_such_run(run_id: str) -> RunResult:
    return RunResult(run_id, None)
