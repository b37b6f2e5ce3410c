"""Why a run makes no progress: one pure function that returns a text for people."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from datetime import UTC, datetime
from typing import Any, assert_never

from sublet_engine.run import durable_log
from sublet_engine.run.state import OpenWait, Run, TaskRun
from sublet_protocol.specs import Condition, EventCondition, ParentCondition, SleepCondition, TaskSpec, WorkflowSpec


def why(run: Run, workflow: WorkflowSpec | None, pools: Mapping[str, Collection[str]], now: float) -> dict[str, Any]:
    """The state of a run as text.

    ``pools``: live pools by action (``<workflow>:<task>``). ``now``: Unix seconds. Returns ``text``, which explains the
    whole run, and ``tasks``, one sentence by task name.
    """
    if workflow is None:
        reason = run.error.message if run.error is not None else f"version {run.version} of its workflow is unknown"
        return {"text": f"run {run.id} is {run.status}: {reason}", "tasks": {}}
    tasks = {
        task.name: _why_task(run, task, workflow.task(task.name), pools.get(f"{run.workflow}:{task.name}", ()), now)
        for task in run.tasks
    }
    lines = [f"run {run.id} of {run.workflow} is {run.status}", *(f"  {name}: {text}" for name, text in tasks.items())]
    return {"text": "\n".join(lines), "tasks": tasks}


def _why_task(run: Run, task: TaskRun, spec: TaskSpec, pools: Collection[str], now: float) -> str:
    match task.status:
        case "PENDING":
            return f"pending: {_why_pending(run, task, spec)}"
        case "READY":
            return f"ready since {_time(task.ready_at)}, {_why_ready(pools)}"
        case "RUNNING":
            assert task.lease is not None
            released = ", its slot released" if task.lease.released else ""
            return f"running on worker {task.lease.worker} since {_time(task.lease.granted_at)}{released}"
        case "EVICTED":
            waits = "; ".join(_why_open(wait) for wait in task.open_waits)
            return f"evicted since {_time(task.evicted_at)}, holds no slot; waits for {waits}"
        case "BACKOFF":
            return f"waits for its retry {task.retries_used} of {spec.retries} (last error: {_error(task)})"
        case "FAILED":
            return f"failed: {_error(task)}"
        case "COMPLETED" | "SKIPPED" | "CANCELLED":
            return task.status.lower() + (f": {task.reason}" if task.reason else "")
        case _:
            assert_never(task.status)


def _why_ready(pools: Collection[str]) -> str:
    if not pools:
        return "no live worker has registered it"
    return f"waits for a free slot of pool {' or '.join(sorted(pools))}"


def _why_pending(run: Run, task: TaskRun, spec: TaskSpec) -> str:
    parents = [name for name in spec.dependencies if not run.task(name).terminal]
    if parents:
        return f"waits for {', '.join(parents)}"
    unmet = [
        " or ".join(_condition(condition) for condition in group)
        for group in spec.wait_for
        if not any(condition.key in task.met for condition in group)
    ]
    return f"waits for {' and '.join(unmet)}" if unmet else "waits for the other tasks of the run"


def _why_open(wait: OpenWait) -> str:
    if wait.child_run_id is not None:
        return f"child run {wait.child_run_id} (operation {wait.operation_id})"
    met = {key for key, _ in wait.met}
    open_ones = [_condition(condition) for condition in durable_log.conditions_of(wait) if condition.key not in met]
    return f"{', '.join(open_ones)} since {_time(wait.asked_at)} (operation {wait.operation_id})"


def _condition(condition: Condition) -> str:
    match condition:
        case SleepCondition():
            return f"a sleep of {condition.duration_s:g} s"
        case EventCondition():
            where = f" where {condition.expression}" if condition.expression else ""
            scope = f" in scope {condition.scope!r}" if condition.scope else ""
            return f"event {condition.event_key}{scope}{where}"
        case ParentCondition():
            return f"parent {condition.parent} to give {condition.expression or 'a result'}"
        case _:
            assert_never(condition)


def _error(task: TaskRun) -> str:
    return f"{task.error.type}: {task.error.message}" if task.error is not None else "unknown"


def _time(at: float | None) -> str:
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="seconds") if at is not None else "?"
