"""The options of tasks and of workflows, each stated once."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypedDict

from sublet._declare.conditions import Condition, OrGroup
from sublet._declare.durations import Duration
from sublet._declare.types import JSON, DefaultFilter, EvictionPolicy, Priority, TaskDefaults, TaskType
from sublet_protocol import limits

if TYPE_CHECKING:
    from sublet._declare.task import Task

DEFAULT_SCHEDULE_TIMEOUT = timedelta(seconds=limits.DEFAULT_SCHEDULE_TIMEOUT_S)
DEFAULT_EXECUTION_TIMEOUT = timedelta(seconds=limits.DEFAULT_EXECUTION_TIMEOUT_S)

Conditions = list[Condition | OrGroup]
"""All of these must be true; `or_` makes a group of which one is enough."""


class CommonOptions(TypedDict, total=False):
    """Keyword arguments that ``client.workflow``, ``client.task`` and ``client.durable_task`` share.

    These dictionaries are for type checkers only; `Sublet.workflow` and `Workflow.task` explain each argument.
    """

    description: str | None
    on_events: list[str] | None
    version: str | None
    default_priority: int | Priority
    default_filters: list[DefaultFilter] | None
    default_additional_metadata: JSON | None


class WorkflowOptions(CommonOptions, total=False):
    """Keyword arguments of ``client.workflow`` besides the name and the type of the input."""

    task_defaults: TaskDefaults


class StandaloneOptions(CommonOptions, total=False):
    """Keyword arguments of ``client.task`` besides the type of the input."""

    name: str | None
    schedule_timeout: Duration
    execution_timeout: Duration
    retries: int
    backoff_factor: float | None
    backoff_max_seconds: int | None


class DurableStandaloneOptions(StandaloneOptions, total=False):
    """Keyword arguments of ``client.durable_task`` besides the type of the input."""

    eviction_policy: EvictionPolicy | None


@dataclass(frozen=True, kw_only=True)
class TaskOptions:
    """What is declared about one task. See `Workflow.task` for the meaning of each option."""

    name: str | None = None
    """None: the name of the function."""
    schedule_timeout: Duration = DEFAULT_SCHEDULE_TIMEOUT
    execution_timeout: Duration = DEFAULT_EXECUTION_TIMEOUT
    parents: Sequence[Task[Any, Any]] | None = None
    retries: int = 0
    backoff_factor: float | None = None
    backoff_max_seconds: int | None = None
    wait_for: Conditions | None = None
    skip_if: Conditions | None = None
    cancel_if: Conditions | None = None
    is_durable: bool = False
    eviction_policy: EvictionPolicy | None = None
    type: TaskType = TaskType.DEFAULT

    def filled_from(self, defaults: TaskDefaults) -> TaskOptions:
        """The options, with the workflow's defaults in place of those that the task leaves at Sublet's defaults."""
        fields = {field.name: field.default for field in dataclasses.fields(self)}
        changes = {
            name: preset
            for name in TaskDefaults.model_fields
            if (preset := getattr(defaults, name)) is not None and getattr(self, name) == fields[name]
        }
        return dataclasses.replace(self, **changes)
