"""Small types of the public signatures: options, enumerations, filters."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timedelta
from enum import IntEnum, StrEnum
from typing import Any, ClassVar, Protocol, TypeVar

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from sublet._declare.durations import Duration
from sublet_protocol.cel.expressions import FILTER_VARIABLES, compile_expression

JSON = Mapping[str, Any]
"""A JSON object as a Python dictionary."""


class DataclassInstance(Protocol):
    """Any instance of a dataclass."""

    __dataclass_fields__: ClassVar[dict[str, Any]]


class EmptyModel(BaseModel):
    """Input of workflows that declare no input type. Accepts any fields, and has them as attributes."""

    model_config = ConfigDict(extra="allow", frozen=True)


In = TypeVar("In", bound=BaseModel | Mapping[str, Any] | DataclassInstance)
"""Type of a workflow's input: a pydantic model, a dataclass, a TypedDict or a dictionary."""

R = TypeVar("R", bound=BaseModel | Mapping[str, Any] | DataclassInstance | None)
"""Type of what a task returns: a pydantic model, a mapping, a dataclass or None."""


class Priority(IntEnum):
    """Priority of a run. Among the ready tasks of a pool, those of higher priority run first."""

    LOW = 1
    MEDIUM = 2
    HIGH = 3

    @classmethod
    def _missing_(cls, value: object) -> Priority:
        raise ValueError(f"a priority is 1 (LOW), 2 (MEDIUM) or 3 (HIGH), not {value!r}")


class RunStatus(StrEnum):
    """Status of a run or a task. COMPLETED, CANCELLED and FAILED are final."""

    QUEUED = "QUEUED"
    RUNNING = "RUNNING"
    COMPLETED = "COMPLETED"
    CANCELLED = "CANCELLED"
    FAILED = "FAILED"


V1TaskStatus = RunStatus


class TaskType(StrEnum):
    """Kind of a task: an ordinary one, or the on-failure or on-success task of its workflow."""

    DEFAULT = "DEFAULT"
    ON_FAILURE = "ON_FAILURE"
    ON_SUCCESS = "ON_SUCCESS"


class TaskDefaults(BaseModel):
    """Options for the tasks of a workflow. They apply where a task leaves an option at its default."""

    schedule_timeout: Duration | None = None
    execution_timeout: Duration | None = None
    retries: int | None = None
    backoff_factor: float | None = None
    backoff_max_seconds: int | None = None


class DefaultFilter(BaseModel):
    """An event starts a run of the workflow only if it has this scope and the expression is true for it.

    The expression is CEL. Its variables are ``input`` (the payload of the event), ``payload`` (that of this filter),
    ``additional_metadata``, ``event_key`` and ``event_id``. The started run has ``ctx.filter_payload``.

    Raises:
        ValueError: the expression is not valid CEL.
    """

    expression: str
    scope: str
    payload: dict[str, Any] = Field(default_factory=dict)

    @field_validator("expression")
    @classmethod
    def _valid_cel(cls, expression: str) -> str:
        compile_expression(expression, FILTER_VARIABLES)
        return expression


class EvictionPolicy(BaseModel):
    """When a durable task is evicted from its worker while all its branches wait.

    Attributes:
        ttl: how long the task may wait on its worker before it is evicted. Zero: it is evicted at once. None: waiting
            alone does not evict it.
        allow_capacity_eviction: the task may be evicted earlier when waiting tasks hold all durable slots of the
            worker.
        priority: tasks with the lowest priority are evicted first in that case.
    """

    model_config = ConfigDict(frozen=True)

    ttl: timedelta | None
    allow_capacity_eviction: bool = True
    priority: int = 0


DEFAULT_DURABLE_TASK_EVICTION_POLICY = EvictionPolicy(ttl=timedelta(0))
"""Evicts at once: a waiting task holds no slot."""


class TriggerWorkflowOptions(BaseModel):
    """Options of one run as one object. Arguments of the same names take precedence."""

    child_key: str | None = None
    additional_metadata: dict[str, Any] = Field(default_factory=dict)
    priority: Priority | None = None


class WorkflowRunTriggerConfig(BaseModel):
    """One item for ``run_many``, made by ``create_bulk_run_item``. ``input`` is JSON text."""

    workflow_name: str
    input: str | None = None
    options: TriggerWorkflowOptions = Field(default_factory=TriggerWorkflowOptions)
    key: str | None = None
    """For your own use; not sent."""


class BulkPushEventWithMetadata(BaseModel):
    """One event for ``event.bulk_push``."""

    key: str
    payload: dict[str, Any] = Field(default_factory=dict)
    additional_metadata: dict[str, Any] = Field(default_factory=dict)
    priority: Priority | None = None
    scope: str | None = None


class RunFilter(BaseModel):
    """Selects runs for a bulk operation. A run must match all fields that are given."""

    since: datetime
    until: datetime | None = None
    statuses: list[RunStatus] | None = None
    workflow_ids: list[str] | None = None
    """Names of workflows."""
    additional_metadata: dict[str, Any] | None = None


class BulkCancelReplayOpts(BaseModel):
    """Runs for a bulk operation: either their ids, or a filter."""

    ids: list[str] | None = None
    filters: RunFilter | None = None

    @model_validator(mode="after")
    def _exactly_one(self) -> BulkCancelReplayOpts:
        if (self.ids is None) == (self.filters is None):
            raise ValueError("give exactly one of ids and filters")
        return self
