"""How workflows and standalone tasks are run: the methods that both share, with the types of their results."""

from __future__ import annotations

from typing import Any, Generic, Literal, TypeVar, overload

from sublet._declare.base import NO_INPUT, BaseWorkflow, only, unless_failed
from sublet._declare.types import JSON, In, Priority, TriggerWorkflowOptions, WorkflowRunTriggerConfig

Value = TypeVar("Value")
"""Type of the result of a completed run."""

Ref = TypeVar("Ref")
"""Type of the handle of a run."""


class RunnableWorkflow(BaseWorkflow[In], Generic[In, Value, Ref]):
    """A workflow or a standalone task, with the methods that run it."""

    @overload
    def run(
        self,
        input: In = ...,
        options: TriggerWorkflowOptions | None = ...,
        wait_for_result: Literal[True] = ...,
        child_key: str | None = ...,
        additional_metadata: JSON | None = ...,
        priority: int | Priority | None = ...,
    ) -> Value: ...

    @overload
    def run(
        self,
        input: In = ...,
        options: TriggerWorkflowOptions | None = ...,
        *,
        wait_for_result: Literal[False],
        child_key: str | None = ...,
        additional_metadata: JSON | None = ...,
        priority: int | Priority | None = ...,
    ) -> Ref: ...

    def run(
        self,
        input: In = NO_INPUT,
        options: TriggerWorkflowOptions | None = None,
        wait_for_result: bool = True,
        child_key: str | None = None,
        additional_metadata: JSON | None = None,
        priority: int | Priority | None = None,
    ) -> Value | Ref:
        """Run the workflow or standalone task, and wait for its result. Blocks this thread.

        Args:
            input: checked against the declared type before anything is sent.
            options: the following arguments in one object. Arguments that are given directly take precedence.
            wait_for_result: False returns a handle as soon as RabbitMQ has confirmed the request.
            child_key: only inside a task: the name of the child among the children of this parent. The same key
                always means the same run. Without keys, children are numbered in the order in which they are started.
            additional_metadata: merged over the default metadata of the workflow and the metadata of the parent run.
            priority: replaces the default priority of the workflow.

        Returns:
            For a standalone task: what its function returned, as the annotated type. For a workflow: a dictionary of
            the output of each task by the name of the task. It is None for a task without output, and
            ``{"skipped": True}`` for a task that was skipped.

        Raises:
            pydantic.ValidationError: the input does not fit the declared type.
            ValueError: the input or the metadata cannot be written as JSON, or are too large.
            FailedTaskRunExceptionGroup: a task failed and has no retries left. ``exceptions`` holds the error of each
                task that failed.
            RunCancelledError: the run was cancelled.
            UnknownWorkflowError: no worker has ever registered this workflow.
            TransportUnavailable: RabbitMQ did not confirm the request in time. The run may or may not start.
        """
        item = self.create_bulk_run_item(input, None, options, child_key, additional_metadata, priority)
        return only(self._run_items([item], wait_for_result))  # type: ignore[no-any-return]

    @overload
    async def aio_run(
        self,
        input: In = ...,
        options: TriggerWorkflowOptions | None = ...,
        wait_for_result: Literal[True] = ...,
        child_key: str | None = ...,
        additional_metadata: JSON | None = ...,
        priority: int | Priority | None = ...,
    ) -> Value: ...

    @overload
    async def aio_run(
        self,
        input: In = ...,
        options: TriggerWorkflowOptions | None = ...,
        *,
        wait_for_result: Literal[False],
        child_key: str | None = ...,
        additional_metadata: JSON | None = ...,
        priority: int | Priority | None = ...,
    ) -> Ref: ...

    async def aio_run(
        self,
        input: In = NO_INPUT,
        options: TriggerWorkflowOptions | None = None,
        wait_for_result: bool = True,
        child_key: str | None = None,
        additional_metadata: JSON | None = None,
        priority: int | Priority | None = None,
    ) -> Value | Ref:
        """Like `run`, for async code.

        In a durable task this is an operation of the durable log: the task can leave its worker while it waits, and a
        child that failed or was cancelled raises `TaskRunError`.
        """
        item = self.create_bulk_run_item(input, None, options, child_key, additional_metadata, priority)
        return only(await self._aio_run_items([item], wait_for_result))  # type: ignore[no-any-return]

    @overload
    def run_many(
        self,
        workflows: list[WorkflowRunTriggerConfig],
        return_exceptions: Literal[False] = ...,
        wait_for_result: Literal[True] = ...,
    ) -> list[Value]: ...

    @overload
    def run_many(
        self,
        workflows: list[WorkflowRunTriggerConfig],
        return_exceptions: Literal[True],
        wait_for_result: Literal[True] = ...,
    ) -> list[Value | BaseException]: ...

    @overload
    def run_many(
        self,
        workflows: list[WorkflowRunTriggerConfig],
        return_exceptions: bool = ...,
        *,
        wait_for_result: Literal[False],
    ) -> list[Ref]: ...

    def run_many(
        self,
        workflows: list[WorkflowRunTriggerConfig],
        return_exceptions: bool = False,
        wait_for_result: bool = True,
    ) -> Any:
        """Start many runs at once. Blocks this thread. Results are in the order of the items.

        Args:
            workflows: the runs, made by `create_bulk_run_item`.
            return_exceptions: True returns the exception of a run that failed in place of its result. False raises
                the first exception, after all runs have ended.
            wait_for_result: False returns handles as soon as RabbitMQ has confirmed the requests.

        Raises:
            The same exceptions as `run`.
        """
        return unless_failed(self._run_items(workflows, wait_for_result), return_exceptions)

    @overload
    async def aio_run_many(
        self,
        workflows: list[WorkflowRunTriggerConfig],
        return_exceptions: Literal[False] = ...,
        wait_for_result: Literal[True] = ...,
    ) -> list[Value]: ...

    @overload
    async def aio_run_many(
        self,
        workflows: list[WorkflowRunTriggerConfig],
        return_exceptions: Literal[True],
        wait_for_result: Literal[True] = ...,
    ) -> list[Value | BaseException]: ...

    @overload
    async def aio_run_many(
        self,
        workflows: list[WorkflowRunTriggerConfig],
        return_exceptions: bool = ...,
        *,
        wait_for_result: Literal[False],
    ) -> list[Ref]: ...

    async def aio_run_many(
        self,
        workflows: list[WorkflowRunTriggerConfig],
        return_exceptions: bool = False,
        wait_for_result: bool = True,
    ) -> Any:
        """Like `run_many`, for async code. In a durable task the same holds as for `aio_run`."""
        return unless_failed(await self._aio_run_items(workflows, wait_for_result), return_exceptions)

    def get_run_ref(self, run_id: str) -> Ref:
        """A handle of a run of this workflow that was started elsewhere. Does not check that the run exists."""
        return self._ref(run_id)  # type: ignore[no-any-return]
