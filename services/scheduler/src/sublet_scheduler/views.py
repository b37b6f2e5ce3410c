"""Runs as clients see them: dictionaries that can be encoded as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from sublet_engine.run.state import Run, TaskRun
from sublet_protocol.messages import LogEntry

PUBLIC_STATUS = {
    "PENDING": "QUEUED",
    "READY": "QUEUED",
    "BACKOFF": "QUEUED",
    "EVICTED": "RUNNING",
    "SKIPPED": "COMPLETED",
}


def run_details(run: Run) -> dict[str, Any]:
    """A run: status, times (Unix seconds), payloads and tasks."""
    return {
        **run_summary(run),
        "input": msgspec.json.decode(run.input),
        "tasks": [task_details(run, task) for task in run.tasks],
    }


def run_summary(run: Run) -> dict[str, Any]:
    return {
        "run_id": run.id,
        "workflow": run.workflow,
        "version": run.version,
        "status": run.status,
        "metadata": run.metadata,
        "priority": run.priority,
        "created_at": run.created_at,
        "started_at": run.started_at,
        "finished_at": run.finished_at,
        "error_message": _error_message(run),
        "cancelled_reason": run.cancelled_reason,
        "parent_task_run_id": run.parent.task_run_id if run.parent is not None else None,
        "trigger": msgspec.to_builtins(run.trigger),
    }


def _error_message(run: Run) -> str | None:
    errors = [run.error] if run.error is not None else [t.error for t in run.tasks if t.status == "FAILED" and t.error]
    return "; ".join(f"{error.type}: {error.message}" for error in errors) or None


def task_details(run: Run, task: TaskRun) -> dict[str, Any]:
    """A task run. ``status`` is one of the five public values; ``state`` is the internal one."""
    return {
        "task_run_id": run.task_run_id(task),
        "name": task.name,
        "status": PUBLIC_STATUS.get(task.status, task.status),
        "state": task.status,
        "is_evicted": task.status == "EVICTED",
        "retry_count": task.retry_count,
        "invocation": task.invocation,
        "worker": task.lease.worker if task.lease is not None else None,
        "slot_released": task.lease is not None and task.lease.released,
        "output": msgspec.json.decode(task.output) if task.output is not None else None,
        "error": msgspec.to_builtins(task.error),
        "reason": task.reason,
        "queued_at": task.queued_at,
        "started_at": task.started_at,
        "finished_at": task.finished_at,
    }


def durable_log(run: Run, task: TaskRun, entries: Sequence[LogEntry]) -> dict[str, Any]:
    """The log of a durable task, with everything else that its code could read: enough to replay it elsewhere."""
    others = [other for other in run.tasks if other.name != task.name]
    return {
        "task_run_id": run.task_run_id(task),
        "workflow": run.workflow,
        "version": run.version,
        "status": task.status,
        "input": msgspec.json.decode(run.input),
        "metadata": run.metadata,
        "priority": run.priority,
        "parents": {
            other.name: msgspec.json.decode(other.output) if other.output is not None else None
            for other in others
            if other.status == "COMPLETED"
        },
        "skipped": [other.name for other in others if other.status == "SKIPPED"],
        "entries": msgspec.json.decode(msgspec.json.encode(entries)),
    }
