"""Handles of runs, and what becomes of a run's result: a value or an exception."""

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
from sublet_protocol.messages import RunResult, json_bytes

Outputs = Mapping[str, bytes | None]
"""Raw JSON of each task's output by the task's name; None for no output."""


class WorkflowRunRef:
    """A run of a workflow."""

    def __init__(self, connection: Connection, workflow_run_id: str) -> None:
        self.workflow_run_id = workflow_run_id
        self._connection = connection

    def result(self) -> dict[str, Any]:
        """Wait for the end of the run; blocks this thread.

        Returns:
            The output of each task by its name; None for one without, ``{"skipped": True}`` for one that was skipped.

        Raises:
            FailedTaskRunExceptionGroup: a task failed.
            RunCancelledError: the run was cancelled.
            RunNotFoundError: there is no such run.
        """
        return all_outputs(outputs_of(*self._connection.sync(self._connection.results([self.workflow_run_id]))))

    async def aio_result(self) -> dict[str, Any]:
        """As `result`."""
        return all_outputs(outputs_of(*await self._connection.aio(self._connection.results([self.workflow_run_id]))))

    def __str__(self) -> str:
        return self.workflow_run_id

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.workflow_run_id!r})"


class TaskRunRef(Generic[In, R]):
    """A run of a standalone task."""

    def __init__(self, connection: Connection, workflow_run_id: str, decode: Callable[[Outputs], R]) -> None:
        self.workflow_run_id = workflow_run_id
        self._connection = connection
        self._decode = decode

    def result(self) -> R:
        """Wait for what the task returns; blocks this thread.

        Raises:
            FailedTaskRunExceptionGroup: it failed.
            RunCancelledError: it was cancelled.
            RunNotFoundError: there is no such run.
        """
        return self._decode(outputs_of(*self._connection.sync(self._connection.results([self.workflow_run_id]))))

    async def aio_result(self) -> R:
        """As `result`."""
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
