"""Models that ``client.runs`` returns: the state of runs and tasks at the time of the query."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from pydantic import BaseModel

from sublet._declare.types import RunStatus


class APIResourceMeta(BaseModel):
    id: str
    created_at: datetime


class WorkflowRunSummary(BaseModel):
    """State of a run. Times are UTC; ``duration`` is in milliseconds."""

    metadata: APIResourceMeta
    status: RunStatus
    display_name: str
    """The name of the workflow."""
    workflow_name: str
    workflow_version_id: str
    workflow_run_external_id: str
    input: dict[str, Any] | None = None
    error_message: str | None = None
    additional_metadata: dict[str, Any] = {}
    priority: int | None = None
    parent_task_external_id: str | None = None
    created_at: datetime
    started_at: datetime | None = None
    finished_at: datetime | None = None
    duration: int | None = None

    @classmethod
    def from_wire(cls, wire: dict[str, Any]) -> WorkflowRunSummary:
        created_at = _time(wire["created_at"])
        assert created_at is not None  # every run has been created
        return cls(
            metadata=APIResourceMeta(id=wire["run_id"], created_at=created_at),
            status=wire["status"],
            display_name=wire["workflow"],
            workflow_name=wire["workflow"],
            workflow_version_id=wire.get("version") or "",
            workflow_run_external_id=wire["run_id"],
            input=wire.get("input"),
            error_message=wire.get("error_message"),
            additional_metadata=wire.get("metadata") or {},
            priority=wire.get("priority"),
            parent_task_external_id=wire.get("parent_task_run_id"),
            created_at=created_at,
            started_at=_time(wire.get("started_at")),
            finished_at=_time(wire.get("finished_at")),
            duration=_duration_ms(wire),
        )


class TaskRunSummary(BaseModel):
    """State of a task of a run. Times are UTC; ``duration`` is in milliseconds."""

    task_external_id: str
    workflow_run_external_id: str
    display_name: str
    """The name of the task."""
    status: RunStatus
    is_evicted: bool = False
    """True if the task waits without a slot. Its status is RUNNING then."""
    retry_count: int = 0
    attempt: int = 1
    invocation: int = 0
    """How often a worker has started or resumed the task."""
    output: dict[str, Any] | None = None
    error_message: str | None = None
    error_trace: str | None = None
    worker: str | None = None
    created_at: datetime | None = None
    started_at: datetime | None = None
    finished_at: datetime | None = None
    duration: int | None = None

    @classmethod
    def from_wire(cls, wire: dict[str, Any], run_id: str) -> TaskRunSummary:
        error = wire.get("error") or {}
        return cls(
            task_external_id=wire["task_run_id"],
            workflow_run_external_id=run_id,
            display_name=wire["name"],
            status=wire["status"],
            is_evicted=wire.get("is_evicted", False),
            retry_count=wire.get("retry_count", 0),
            attempt=wire.get("retry_count", 0) + 1,
            invocation=wire.get("invocation", 0),
            output=wire.get("output"),
            error_message=f"{error['type']}: {error['message']}" if error else None,
            error_trace=error.get("trace"),
            worker=wire.get("worker"),
            created_at=_time(wire.get("queued_at")),
            started_at=_time(wire.get("started_at")),
            finished_at=_time(wire.get("finished_at")),
            duration=_duration_ms(wire),
        )


class WorkflowRunDetails(BaseModel):
    """A run with its tasks, in the order of their declaration."""

    run: WorkflowRunSummary
    tasks: list[TaskRunSummary]

    @classmethod
    def from_wire(cls, wire: dict[str, Any]) -> WorkflowRunDetails:
        return cls(
            run=WorkflowRunSummary.from_wire(wire),
            tasks=[TaskRunSummary.from_wire(task, wire["run_id"]) for task in wire["tasks"]],
        )


class WorkflowRunList(BaseModel):
    """One page of runs, newest first."""

    rows: list[WorkflowRunSummary]


class TaskRunDetail(BaseModel):
    """Short state of a task of a run. ``readable_id`` is the name of the task."""

    external_id: str
    readable_id: str
    output: dict[str, Any] | None = None
    error: str | None = None
    status: RunStatus
    is_evicted: bool = False


class WorkflowRunDetail(BaseModel):
    """A run with its tasks by name. ``done``: the status is final."""

    external_id: str
    status: RunStatus
    input: dict[str, Any] | None = None
    additional_metadata: dict[str, Any] = {}
    task_runs: dict[str, TaskRunDetail]
    done: bool


def _time(unix_s: float | None) -> datetime | None:
    return None if unix_s is None else datetime.fromtimestamp(unix_s, UTC)


def _duration_ms(wire: dict[str, Any]) -> int | None:
    started_at, finished_at = _time(wire.get("started_at")), _time(wire.get("finished_at"))
    if started_at is None or finished_at is None:
        return None
    return round((finished_at - started_at).total_seconds() * 1_000)
