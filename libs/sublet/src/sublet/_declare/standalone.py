"""Standalone tasks: workflows of one task, which are run like a function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic

import msgspec
from pydantic import TypeAdapter

from sublet._client.config import ClientConfig
from sublet._client.connection import Connection
from sublet._client.refs import Outputs, TaskRunRef
from sublet._declare.base import WorkflowConfig
from sublet._declare.options import TaskOptions
from sublet._declare.runnable import RunnableWorkflow
from sublet._declare.serialization import Codec
from sublet._declare.task import Task
from sublet._declare.types import JSON, In, R


class Standalone(RunnableWorkflow[In, R, TaskRunRef[In, R]], Generic[In, R]):
    """A workflow of one task, made by ``@client.task()``, ``@client.durable_task()`` and ``client.stubs.task()``."""

    def __init__(
        self, declared: WorkflowConfig, connection: Connection, config: ClientConfig, output_type: Any
    ) -> None:
        super().__init__(declared, connection, config)
        self._output_codec: Codec[R] = Codec(output_type)

    def add(self, fn: Callable[..., Any], **options: Any) -> None:
        """Set the code of the task. ``options`` are the fields of `TaskOptions`."""
        task: Task[Any, Any] = Task(
            fn, TaskOptions(**options), workflow_name=self.name, input_codec=self._input_codec, config=self._config
        )
        self.tasks = [task]

    @property
    def task(self) -> Task[In, R]:
        """The task itself, for ``ctx.task_output`` and ``parents``.

        Raises:
            ValueError: this is a stub, whose code is in another program.
        """
        if not self.tasks:
            raise ValueError(f"{self.name!r} is a stub: the code of its task is in another program")
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

    def mock_run(
        self,
        input: In | None = None,
        additional_metadata: JSON | None = None,
        parent_outputs: dict[str, JSON] | None = None,
        retry_count: int = 0,
        lifespan: Any = None,
        dependencies: dict[str, Any] | None = None,
    ) -> R:
        """See `Task.mock_run`."""
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
        """Like `mock_run`, for an async function."""
        return await self.task.aio_mock_run(
            input, additional_metadata, parent_outputs, retry_count, lifespan, dependencies
        )

    def _value(self, outputs: Outputs) -> R:
        if len(outputs) > 1:  # a stub for a workflow that turns out to have several tasks
            everything = {task: msgspec.Raw(raw or b"null") for task, raw in outputs.items()}
            return self._child_value(msgspec.json.encode(everything))
        return self._child_value(next(iter(outputs.values()), None))

    def _child_value(self, raw: bytes | None) -> R:
        return self._output_codec.decode_or_empty(raw)

    def _ref(self, run_id: str) -> TaskRunRef[In, R]:
        return TaskRunRef(self._connection, run_id, self._value)
