"""Durable tasks and DAGs on RabbitMQ and MongoDB."""

from sublet.client import Sublet
from sublet.conditions import Condition, OrGroup, ParentCondition, SleepCondition, UserEventCondition, or_
from sublet.config import ClientConfig
from sublet.context import Context
from sublet.durable import DurableContext, SleepResult
from sublet.durations import Duration
from sublet.events import Event
from sublet.exceptions import (
    FailedTaskRunExceptionGroup,
    IllegalTaskOutputError,
    LifespanSetupError,
    LoopAlreadyRunningError,
    NonDeterminismError,
    NonRetryableException,
    RunCancelledError,
    RunNotFoundError,
    TaskRunError,
    UnknownWorkflowError,
)
from sublet.read_models import (
    TaskRunDetail,
    TaskRunSummary,
    WorkflowRunDetail,
    WorkflowRunDetails,
    WorkflowRunList,
    WorkflowRunSummary,
)
from sublet.refs import TaskRunRef, WorkflowRunRef
from sublet.serialization import is_in_sublet_serialization_context, remove_null_unicode_character
from sublet.standalone import Standalone
from sublet.task import Task
from sublet.transport import TransportUnavailable
from sublet.types import (
    DEFAULT_DURABLE_TASK_EVICTION_POLICY,
    BulkCancelReplayOpts,
    BulkPushEventWithMetadata,
    DefaultFilter,
    EmptyModel,
    EvictionPolicy,
    Priority,
    RunFilter,
    RunStatus,
    TaskDefaults,
    TriggerWorkflowOptions,
    V1TaskStatus,
    WorkflowRunTriggerConfig,
)
from sublet.worker import Worker, WorkerStatus
from sublet.workflow import Workflow

__all__ = [
    "DEFAULT_DURABLE_TASK_EVICTION_POLICY",
    "BulkCancelReplayOpts",
    "BulkPushEventWithMetadata",
    "ClientConfig",
    "Condition",
    "Context",
    "DefaultFilter",
    "DurableContext",
    "Duration",
    "EmptyModel",
    "Event",
    "EvictionPolicy",
    "FailedTaskRunExceptionGroup",
    "IllegalTaskOutputError",
    "LifespanSetupError",
    "LoopAlreadyRunningError",
    "NonDeterminismError",
    "NonRetryableException",
    "OrGroup",
    "ParentCondition",
    "Priority",
    "RunCancelledError",
    "RunFilter",
    "RunNotFoundError",
    "RunStatus",
    "SleepCondition",
    "SleepResult",
    "Standalone",
    "Sublet",
    "Task",
    "TaskDefaults",
    "TaskRunDetail",
    "TaskRunError",
    "TaskRunRef",
    "TaskRunSummary",
    "TransportUnavailable",
    "TriggerWorkflowOptions",
    "UnknownWorkflowError",
    "UserEventCondition",
    "V1TaskStatus",
    "Worker",
    "WorkerStatus",
    "Workflow",
    "WorkflowRunDetail",
    "WorkflowRunDetails",
    "WorkflowRunList",
    "WorkflowRunRef",
    "WorkflowRunSummary",
    "WorkflowRunTriggerConfig",
    "is_in_sublet_serialization_context",
    "or_",
    "remove_null_unicode_character",
]
