"""Durable tasks and DAGs on RabbitMQ and MongoDB."""

from sublet._client.client import Sublet
from sublet._client.config import ClientConfig
from sublet._client.events import Event
from sublet._client.read_models import (
    TaskRunDetail,
    TaskRunSummary,
    WorkflowRunDetail,
    WorkflowRunDetails,
    WorkflowRunList,
    WorkflowRunSummary,
)
from sublet._client.refs import TaskRunRef, WorkflowRunRef
from sublet._declare.conditions import Condition, OrGroup, ParentCondition, SleepCondition, UserEventCondition, or_
from sublet._declare.durations import Duration
from sublet._declare.serialization import is_in_sublet_serialization_context, remove_null_unicode_character
from sublet._declare.standalone import Standalone
from sublet._declare.task import Task
from sublet._declare.types import (
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
from sublet._declare.workflow import Workflow
from sublet._durable.context import DurableContext, SleepResult
from sublet._errors import (
    FailedTaskRunExceptionGroup,
    IllegalTaskOutputError,
    LifespanSetupError,
    LoopAlreadyRunningError,
    NonDeterminismError,
    NonRetryableException,
    RunCancelledError,
    RunNotFoundError,
    SubletError,
    TaskRunError,
    TransportUnavailable,
    UnknownWorkflowError,
)
from sublet._worker.context import Context
from sublet._worker.worker import Worker, WorkerStatus

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
    "SubletError",
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
