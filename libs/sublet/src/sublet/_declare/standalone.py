"""A workflow of one task, which is run as if it were a function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, Literal, overload

import msgspec
from pydantic import TypeAdapter

from sublet._client.config import ClientConfig
from sublet._client.connection import Connection
from sublet._client.refs import Outputs, TaskRunRef
from sublet._declare.base import NO_INPUT, BaseWorkflow, WorkflowConfig, only, unless_failed
from sublet._declare.serialization import Codec
from sublet._declare.task import Task
from sublet._declare.types import JSON, In, Priority, R, TriggerWorkflowOptions, WorkflowRunTriggerConfig


class Standalone(BaseWorkflow[In], Generic[In, R]):
    """A task on its own: what ``@client.task()``, ``@client.durable_task()`` and ``client.stubs.task()`` make."""

    def __init__(
        self, declared: WorkflowConfig, connection: Connection, config: ClientConfig, output_type: Any
    ) -> None:
        super().__init__(declared, connection, config)
        self._output_codec: Codec[R] = Codec(output_type)

    def add(self, fn: Callable[..., Any], **options: Any) -> None:
        """Give it its task."""
        self.tasks = [Task(fn, workflow_name=self.name, input_codec=self._input_codec, config=self._config, **options)]

    @property
    def task(self) -> Task[In, R]:
        """The task itself, for ``ctx.task_output`` and ``parents``.

        Raises:
            ValueError: this is a stub, whose code lives elsewhere.
        """
        if not self.tasks:
            raise ValueError(f"{self.name!r} is a stub: the code of its task lives elsewhere")
        return self.tasks[0]

    @property
    def is_async_function(self) -> bool:
        return self.task.is_async_function

    @property
    def output_validator(self) -> TypeAdapter[R]:
        return self._output_codec.adapter

    @property
    def output_validator_type(self) -> Any:
        return self._output_codec.type

    @overload
    def run(
        self,
        input: In = ...,
        options: TriggerWorkflowOptions | None = ...,
        wait_for_result: Literal[True] = ...,
        child_key: str | None = ...,
        additional_metadata: JSON | None = ...,
        priority: int | Priority | None = ...,
    ) -> R: ...

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
    ) -> TaskRunRef[In, R]: ...

    def run(
        self,
        input: In = NO_INPUT,
        options: TriggerWorkflowOptions | None = None,
        wait_for_result: bool = True,
        child_key: str | None = None,
        additional_metadata: JSON | None = None,
        priority: int | Priority | None = None,
    ) -> R | TaskRunRef[In, R]:
        """Run the task, and wait for what it returns; blocks this thread.

        Args:
            input: checked here against the declared type.
            options: the arguments below in one object; those given directly win.
            wait_for_result: False returns a handle as soon as the broker has the request.
            child_key: inside a task: the child's name among the children of this parent; the same key is the same
                run. Without it children are numbered in the order in which they are started.
            additional_metadata: over the task's default metadata, and over that of the running parent.
            priority: instead of the task's own.

        Raises:
            pydantic.ValidationError: the input does not fit the declared type.
            ValueError: the input or the metadata cannot be written as JSON, or is too large.
            FailedTaskRunExceptionGroup: the task failed, after its retries.
            RunCancelledError: the run was cancelled.
            UnknownWorkflowError: no worker has ever registered this task.
            TransportUnavailable: the broker did not confirm the request in time.
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
    ) -> R: ...

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
    ) -> TaskRunRef[In, R]: ...

    async def aio_run(
        self,
        input: In = NO_INPUT,
        options: TriggerWorkflowOptions | None = None,
        wait_for_result: bool = True,
        child_key: str | None = None,
        additional_metadata: JSON | None = None,
        priority: int | Priority | None = None,
    ) -> R | TaskRunRef[In, R]:
        """As `run`. In a durable task it is an operation of the log: the task gives its slot away while it waits, and
        a failed or cancelled child raises `TaskRunError`."""
        item = self.create_bulk_run_item(input, None, options, child_key, additional_metadata, priority)
        return only(await self._aio_run_items([item], wait_for_result))  # type: ignore[no-any-return]

    @overload
    def run_many(
        self,
        workflows: list[WorkflowRunTriggerConfig],
        return_exceptions: Literal[False] = ...,
        wait_for_result: Literal[True] = ...,
    ) -> list[R]: ...

    @overload
    def run_many(
        self,
        workflows: list[WorkflowRunTriggerConfig],
        return_exceptions: Literal[True],
        wait_for_result: Literal[True] = ...,
    ) -> list[R | BaseException]: ...

    @overload
    def run_many(
        self,
        workflows: list[WorkflowRunTriggerConfig],
        return_exceptions: bool = ...,
        *,
        wait_for_result: Literal[False],
    ) -> list[TaskRunRef[In, R]]: ...

    def run_many(
        self,
        workflows: list[WorkflowRunTriggerConfig],
        return_exceptions: bool = False,
        wait_for_result: bool = True,
    ) -> Any:
        """Start many runs at once; the results stand in the order of the items, which `create_bulk_run_item` makes.

        With ``return_exceptions`` a run that fails gives its exception in its place; otherwise the first of them is
        raised when all runs have ended. Errors as in `run`.
        """
        return unless_failed(self._run_items(workflows, wait_for_result), return_exceptions)

    @overload
    async def aio_run_many(
        self,
        workflows: list[WorkflowRunTriggerConfig],
        return_exceptions: Literal[False] = ...,
        wait_for_result: Literal[True] = ...,
    ) -> list[R]: ...

    @overload
    async def aio_run_many(
        self,
        workflows: list[WorkflowRunTriggerConfig],
        return_exceptions: Literal[True],
        wait_for_result: Literal[True] = ...,
    ) -> list[R | BaseException]: ...

    @overload
    async def aio_run_many(
        self,
        workflows: list[WorkflowRunTriggerConfig],
        return_exceptions: bool = ...,
        *,
        wait_for_result: Literal[False],
    ) -> list[TaskRunRef[In, R]]: ...

    async def aio_run_many(
        self,
        workflows: list[WorkflowRunTriggerConfig],
        return_exceptions: bool = False,
        wait_for_result: bool = True,
    ) -> Any:
        """As `run_many`; in a durable task as `aio_run`."""
        return unless_failed(await self._aio_run_items(workflows, wait_for_result), return_exceptions)

    def get_run_ref(self, run_id: str) -> TaskRunRef[In, R]:
        """The handle of a run of this task that was started elsewhere."""
        return self._ref(run_id)

    def mock_run(
        self,
        input: In | None = None,
        additional_metadata: JSON | None = None,
        parent_outputs: dict[str, JSON] | None = None,
        retry_count: int = 0,
        lifespan: Any = None,
        dependencies: dict[str, Any] | None = None,
    ) -> R:
        """As `Task.mock_run`."""
        return self.task.mock_run(input, additional_metadata, parent_outputs, retry_count, lifespan, dependencies)

    async def aio_mock_run(
        self,
        input: In | None = None,
        additional_metadata: JSON | None = None,
        parent_outputs: dict[str, JSON] | None = None,
        retry_count: int = 0,
        lifespan: Any = None,
        dependencies: dict[str, Any] | None = None,
    ) -> R:
        """As `mock_run`, for an async function."""
        return await self.task.aio_mock_run(
            input, additional_metadata, parent_outputs, retry_count, lifespan, dependencies
        )

    def _value(self, outputs: Outputs) -> R:
        if len(outputs) > 1:  # a stub of a workflow that has more tasks after all
            everything = {task: msgspec.Raw(raw or b"null") for task, raw in outputs.items()}
            return self._child_value(msgspec.json.encode(everything))
        return self._child_value(next(iter(outputs.values()), None))

    def _child_value(self, raw: bytes | None) -> R:
        return self._output_codec.decode_or_empty(raw)

    def _ref(self, run_id: str) -> TaskRunRef[In, R]:
        return TaskRunRef(self._connection, run_id, self._value)
