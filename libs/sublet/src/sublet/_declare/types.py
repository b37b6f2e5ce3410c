"""Small types that users meet in signatures."""

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
    """The input of workflows that declare none. Takes any fields, and keeps them as attributes."""

    model_config = ConfigDict(extra="allow", frozen=True)


In = TypeVar("In", bound=BaseModel | Mapping[str, Any] | DataclassInstance)
"""Type of a workflow's input: a pydantic model, a dataclass, a TypedDict or a dictionary."""

R = TypeVar("R", bound=BaseModel | Mapping[str, Any] | DataclassInstance | None)
"""Type of what a task returns: a pydantic model, a mapping, a dataclass or None."""


class Priority(IntEnum):
    """Of the ready tasks of a pool, those of higher priority run first."""

    LOW = 1
    MEDIUM = 2
    HIGH = 3

    @classmethod
    def _missing_(cls, value: object) -> Priority:
        raise ValueError(f"a priority is 1 (LOW), 2 (MEDIUM) or 3 (HIGH), not {value!r}")


class RunStatus(StrEnum):
    """How far a run, or a task of it, has come. The last three are final."""

    QUEUED = "QUEUED"
    RUNNING = "RUNNING"
    COMPLETED = "COMPLETED"
    CANCELLED = "CANCELLED"
    FAILED = "FAILED"


V1TaskStatus = RunStatus


class TaskType(StrEnum):
    """When a task of a workflow runs."""

    DEFAULT = "DEFAULT"
    ON_FAILURE = "ON_FAILURE"
    ON_SUCCESS = "ON_SUCCESS"


class TaskDefaults(BaseModel):
    """Fills the parameters of a workflow's tasks where a declaration leaves their defaults."""

    schedule_timeout: Duration | None = None
    execution_timeout: Duration | None = None
    retries: int | None = None
    backoff_factor: float | None = None
    backoff_max_seconds: int | None = None


class DefaultFilter(BaseModel):
    """Lets an event start a run of the workflow only if its scope is ``scope`` and ``expression`` is true.

    The expression is CEL over ``input`` (the event's payload), ``payload`` (this filter's), ``additional_metadata``,
    ``event_key`` and ``event_id``.
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
    """When a durable task whose every branch waits gives its slot away.

    ``ttl``: how long it may first stay on its worker (zero: not at all; None: until something else evicts it).
    ``allow_capacity_eviction``: it may have to go earlier when the worker's durable slots run short, those with the
    lowest ``priority`` first.
    """

    model_config = ConfigDict(frozen=True)

    ttl: timedelta | None
    allow_capacity_eviction: bool = True
    priority: int = 0


DEFAULT_DURABLE_TASK_EVICTION_POLICY = EvictionPolicy(ttl=timedelta(0))
"""At once: a slot is not held while its task waits."""


class TriggerWorkflowOptions(BaseModel):
    """Options of one run in one object; the arguments of the same names do the same."""

    child_key: str | None = None
    additional_metadata: dict[str, Any] = Field(default_factory=dict)
    priority: Priority | None = None


class WorkflowRunTriggerConfig(BaseModel):
    """One run for ``run_many``: made by ``create_bulk_run_item``. ``input`` is JSON."""

    workflow_name: str
    input: str | None = None
    options: TriggerWorkflowOptions = Field(default_factory=TriggerWorkflowOptions)
    key: str | None = None
    """For the caller's own use; not sent."""


class BulkPushEventWithMetadata(BaseModel):
    """One event for ``event.bulk_push``."""

    key: str
    payload: dict[str, Any] = Field(default_factory=dict)
    additional_metadata: dict[str, Any] = Field(default_factory=dict)
    priority: Priority | None = None
    scope: str | None = None


class RunFilter(BaseModel):
    """Which runs a bulk operation means."""

    since: datetime
    until: datetime | None = None
    statuses: list[RunStatus] | None = None
    workflow_ids: list[str] | None = None
    """Names of workflows."""
    additional_metadata: dict[str, Any] | None = None


class BulkCancelReplayOpts(BaseModel):
    """Either the ids of runs, or a filter that finds them."""

    ids: list[str] | None = None
    filters: RunFilter | None = None

    @model_validator(mode="after")
    def _exactly_one(self) -> BulkCancelReplayOpts:
        if (self.ids is None) == (self.filters is None):
            raise ValueError("give exactly one of ids and filters")
        return self
