"""Handles of runs, and the conversion of their results to values or exceptions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Generic

import msgspec

from sublet._client.connection import Connection
from sublet._declare.types import In, R
from sublet._errors import (
    FailedTaskRunExceptionGroup,
    RunCancelledError,
    RunNotFoundError,
    TaskRunError,
    UnknownWorkflowError,
)
from sublet_protocol.messages import RunResult
from sublet_protocol.raw_json import json_bytes

Outputs = Mapping[str, bytes | None]
"""Raw JSON of each task's output by the task's name; None for no output."""


class WorkflowRunRef:
    """Handle of a run of a workflow. ``workflow_run_id`` is its id."""

    def __init__(self, connection: Connection, workflow_run_id: str) -> None:
        self.workflow_run_id = workflow_run_id
        self._connection = connection

    def result(self) -> dict[str, Any]:
        """Wait until the run has ended. Blocks this thread.

        Returns:
            The output of each task by its name: None for a task without output, ``{"skipped": True}`` for a skipped
            task.

        Raises:
            FailedTaskRunExceptionGroup: a task failed and has no retries left.
            RunCancelledError: the run was cancelled.
            UnknownWorkflowError: no worker has ever registered the workflow.
            RunNotFoundError: there is no such run.
            TransportUnavailable: RabbitMQ is not reachable.
        """
        return all_outputs(outputs_of(*self._connection.sync(self._connection.results([self.workflow_run_id]))))

    async def aio_result(self) -> dict[str, Any]:
        """Like `result`, for async code."""
        return all_outputs(outputs_of(*await self._connection.aio(self._connection.results([self.workflow_run_id]))))

    def __str__(self) -> str:
        return self.workflow_run_id

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.workflow_run_id!r})"


class TaskRunRef(Generic[In, R]):
    """Handle of a run of a standalone task. ``workflow_run_id`` is its id."""

    def __init__(self, connection: Connection, workflow_run_id: str, decode: Callable[[Outputs], R]) -> None:
        self.workflow_run_id = workflow_run_id
        self._connection = connection
        self._decode = decode

    def result(self) -> R:
        """Wait until the run has ended, and return the output of the task. Blocks this thread.

        Raises:
            FailedTaskRunExceptionGroup: the task failed and has no retries left.
            RunCancelledError: the run was cancelled.
            UnknownWorkflowError: no worker has ever registered the task.
            RunNotFoundError: there is no such run.
            TransportUnavailable: RabbitMQ is not reachable.
        """
        return self._decode(outputs_of(*self._connection.sync(self._connection.results([self.workflow_run_id]))))

    async def aio_result(self) -> R:
        """Like `result`, for async code."""
        return self._decode(outputs_of(*await self._connection.aio(self._connection.results([self.workflow_run_id]))))

    def __str__(self) -> str:
        return self.workflow_run_id

    def __repr__(self) -> str:
        return f"TaskRunRef({self.workflow_run_id!r})"


def outputs_of(result: RunResult) -> Outputs:
    """The raw outputs of a completed run.

    Raises:
        FailedTaskRunExceptionGroup, UnknownWorkflowError, RunCancelledError, RunNotFoundError: it did not complete.
    """
    if result.status == "COMPLETED":
        return {task: json_bytes(raw) for task, raw in result.outputs.items()}
    if result.status == "CANCELLED":
        reason = f": {result.cancelled_reason}" if result.cancelled_reason else "."
        raise RunCancelledError(f"Workflow run {result.run_id} was cancelled{reason}")
    if result.status is None:
        raise RunNotFoundError(f"There is no workflow run {result.run_id}.")
    for error in result.errors:
        if error.type == "UnknownWorkflow":
            raise UnknownWorkflowError(f"Workflow run {result.run_id} cannot begin: {error.message}")
    errors = [TaskRunError(error.message, error.type, error.trace, error.task_run_id) for error in result.errors]
    raise FailedTaskRunExceptionGroup(f"Workflow run {result.run_id} failed.", errors)


def all_outputs(outputs: Outputs) -> dict[str, Any]:
    """The outputs as Python values."""
    return {task: None if raw is None else msgspec.json.decode(raw) for task, raw in outputs.items()}
