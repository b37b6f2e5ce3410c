"""A workflow of several tasks: a DAG."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

import msgspec

from sublet._client.config import ClientConfig
from sublet._client.connection import Connection
from sublet._client.refs import Outputs, WorkflowRunRef, all_outputs
from sublet._declare.base import WorkflowConfig
from sublet._declare.durations import Duration
from sublet._declare.options import DEFAULT_EXECUTION_TIMEOUT, DEFAULT_SCHEDULE_TIMEOUT, Conditions, TaskOptions
from sublet._declare.runnable import RunnableWorkflow
from sublet._declare.standalone import Standalone
from sublet._declare.task import Task
from sublet._declare.types import (
    DEFAULT_DURABLE_TASK_EVICTION_POLICY,
    EvictionPolicy,
    In,
    R,
    TaskDefaults,
    TaskType,
)

if TYPE_CHECKING:
    from sublet._durable.context import DurableContext
    from sublet._worker.context import Context


class Workflow(RunnableWorkflow[In, dict[str, Any], WorkflowRunRef]):
    """A DAG of tasks, made by ``client.workflow(name=…)``. Its decorators add the tasks."""

    def __init__(
        self,
        declared: WorkflowConfig,
        connection: Connection,
        config: ClientConfig,
        task_defaults: TaskDefaults | None = None,
    ) -> None:
        super().__init__(declared, connection, config)
        self._task_defaults = task_defaults or TaskDefaults()

    # --- declaring ----------------------------------------------------------------------------------------------

    def task(
        self,
        name: str | None = None,
        schedule_timeout: Duration = DEFAULT_SCHEDULE_TIMEOUT,
        execution_timeout: Duration = DEFAULT_EXECUTION_TIMEOUT,
        parents: list[Task[Any, Any]] | None = None,
        retries: int = 0,
        backoff_factor: float | None = None,
        backoff_max_seconds: int | None = None,
        wait_for: Conditions | None = None,
        skip_if: Conditions | None = None,
        cancel_if: Conditions | None = None,
    ) -> Callable[[Callable[[In, Context], R | Awaitable[R]]], Task[In, R]]:
        """Add a task. The function is ``(input, ctx) -> output``, sync or async.

        Durations are a ``timedelta`` or a text such as ``"90s"``, ``"5m"`` or ``"1h30m"``.

        Args:
            name: unique in the workflow; converted to lower case. None: the name of the function.
            schedule_timeout: how long the task may be ready without a worker that takes it. Then it is cancelled.
                Default: 5 minutes.
            execution_timeout: how long one attempt may run. Then the attempt fails. Default: 60 seconds.
            parents: tasks that must complete first. The task does not run if one of them fails or is cancelled.
            retries: how many more attempts follow after a failed one.
            backoff_factor: the delay before retry n is ``backoff_factor ** n`` seconds. None: no delay.
            backoff_max_seconds: the longest delay in seconds. None: one day.
            wait_for: the task starts when all of these conditions are true. They are evaluated from the time when all
                parents are complete.
            skip_if: the task is skipped when all of these are true. Its output is then ``{"skipped": True}``.
            cancel_if: the task and the tasks that depend on it are cancelled when all of these are true.

        Raises:
            ValueError: the name is taken or not valid, a number is out of range, a duration is not understood, two
                conditions have the same key, or a `ParentCondition` names a task that is not a parent.
            TypeError: a parent is not a task, or the return annotation of the function cannot be resolved.
        """
        options = TaskOptions(
            name=name,
            schedule_timeout=schedule_timeout,
            execution_timeout=execution_timeout,
            parents=parents,
            retries=retries,
            backoff_factor=backoff_factor,
            backoff_max_seconds=backoff_max_seconds,
            wait_for=wait_for,
            skip_if=skip_if,
            cancel_if=cancel_if,
        )
        return self._decorator(options)

    def durable_task(
        self,
        name: str | None = None,
        schedule_timeout: Duration = DEFAULT_SCHEDULE_TIMEOUT,
        execution_timeout: Duration = DEFAULT_EXECUTION_TIMEOUT,
        parents: list[Task[Any, Any]] | None = None,
        retries: int = 0,
        backoff_factor: float | None = None,
        backoff_max_seconds: int | None = None,
        wait_for: Conditions | None = None,
        skip_if: Conditions | None = None,
        cancel_if: Conditions | None = None,
        eviction_policy: EvictionPolicy | None = DEFAULT_DURABLE_TASK_EVICTION_POLICY,
    ) -> Callable[[Callable[[In, DurableContext], Awaitable[R]]], Task[In, R]]:
        """Add a durable task: an async function whose operations are recorded in a durable log.

        While it waits it can be evicted from its worker, and any worker can resume it.

        Args:
            execution_timeout: counts active time only, not the time in which the task waits.
            eviction_policy: when the task leaves its worker while it waits, see `EvictionPolicy`. None: never.

        The other arguments and the exceptions are those of `task`.
        """
        options = TaskOptions(
            is_durable=True,
            name=name,
            schedule_timeout=schedule_timeout,
            execution_timeout=execution_timeout,
            parents=parents,
            retries=retries,
            backoff_factor=backoff_factor,
            backoff_max_seconds=backoff_max_seconds,
            wait_for=wait_for,
            skip_if=skip_if,
            cancel_if=cancel_if,
            eviction_policy=eviction_policy,
        )
        return self._decorator(options)

    def on_failure_task(
        self,
        name: str | None = None,
        schedule_timeout: Duration = DEFAULT_SCHEDULE_TIMEOUT,
        execution_timeout: Duration = DEFAULT_EXECUTION_TIMEOUT,
        retries: int = 0,
        backoff_factor: float | None = None,
        backoff_max_seconds: int | None = None,
    ) -> Callable[[Callable[[In, Context], R | Awaitable[R]]], Task[In, R]]:
        """Add the task that runs once when another task of the run has failed and has no retries left.

        ``-on-failure`` is appended to its name. ``ctx.task_run_errors`` holds the errors. The arguments are those of
        `task`.

        Raises:
            ValueError: the workflow has an on-failure task already; or as for `task`.
        """
        self._refuse_second(TaskType.ON_FAILURE)
        options = TaskOptions(
            name=name,
            schedule_timeout=schedule_timeout,
            execution_timeout=execution_timeout,
            retries=retries,
            backoff_factor=backoff_factor,
            backoff_max_seconds=backoff_max_seconds,
            type=TaskType.ON_FAILURE,
        )
        return self._decorator(options)

    def on_success_task(
        self,
        name: str | None = None,
        schedule_timeout: Duration = DEFAULT_SCHEDULE_TIMEOUT,
        execution_timeout: Duration = DEFAULT_EXECUTION_TIMEOUT,
        retries: int = 0,
        backoff_factor: float | None = None,
        backoff_max_seconds: int | None = None,
    ) -> Callable[[Callable[[In, Context], R | Awaitable[R]]], Task[In, R]]:
        """Add the task that runs after all other tasks have completed. ``-on-success`` is appended to its name.

        The arguments are those of `task`.

        Raises:
            ValueError: the workflow has an on-success task already; or as for `task`.
        """
        self._refuse_second(TaskType.ON_SUCCESS)
        options = TaskOptions(
            name=name,
            schedule_timeout=schedule_timeout,
            execution_timeout=execution_timeout,
            retries=retries,
            backoff_factor=backoff_factor,
            backoff_max_seconds=backoff_max_seconds,
            type=TaskType.ON_SUCCESS,
        )
        return self._decorator(options)

    def add_task(self, task: Standalone[Any, Any]) -> None:
        """Add the task of a standalone task to this workflow. It gets the input of this workflow.

        Other tasks can have ``standalone.task`` as a parent.

        Raises:
            TypeError: ``task`` is not a standalone task.
            ValueError: the workflow has a task of the same name.
        """
        if not isinstance(task, Standalone):
            raise TypeError(f"add_task takes a standalone task (made by @client.task()), not {task!r}")
        self._add(task.task.moved_to(self.name, self._input_codec))

    # --- inside -------------------------------------------------------------------------------------------------

    def _decorator(self, options: TaskOptions) -> Callable[[Callable[..., Any]], Task[Any, Any]]:
        if callable(options.name):
            raise TypeError("a decorator of a workflow needs brackets: write @workflow.task(), not @workflow.task")
        filled = options.filled_from(self._task_defaults)

        def decorate(fn: Callable[..., Any]) -> Task[Any, Any]:
            task: Task[Any, Any] = Task(
                fn, filled, workflow_name=self.name, input_codec=self._input_codec, config=self._config
            )
            self._add(task)
            return task

        return decorate

    def _add(self, task: Task[Any, Any]) -> None:
        if any(other.name == task.name for other in self.tasks):
            raise ValueError(f"workflow {self.name!r} already has a task {task.name!r}: give this one another name")
        self.tasks.append(task)
        self._refresh_on_success()

    def _refresh_on_success(self) -> None:
        """Make all leaves the parents of the on-success task, independent of the order of declaration."""
        ordinary = [task for task in self.tasks if task.type is TaskType.DEFAULT]
        inner = {parent.name for task in ordinary for parent in task.parents}
        for task in self.tasks:
            if task.type is TaskType.ON_SUCCESS:
                task.parents = [other for other in ordinary if other.name not in inner]

    def _refuse_second(self, type: TaskType) -> None:
        if any(task.type is type for task in self.tasks):
            kind = "on-failure" if type is TaskType.ON_FAILURE else "on-success"
            raise ValueError(f"workflow {self.name!r} already has an {kind} task: there can be only one")

    def _value(self, outputs: Outputs) -> dict[str, Any]:
        return all_outputs(outputs)

    def _child_value(self, raw: bytes | None) -> dict[str, Any]:
        return {} if raw is None else msgspec.json.decode(raw, type=dict[str, Any])

    def _ref(self, run_id: str) -> WorkflowRunRef:
        return WorkflowRunRef(self._connection, run_id)
