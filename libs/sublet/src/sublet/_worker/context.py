"""The context of a running task: what a task function gets as its second argument.

`current_context` holds it while the code of a task runs, so that clients know which task started a run or an event.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from pydantic_core import to_json

from sublet._client.config import ClientConfig
from sublet._declare.durations import Duration, positive_seconds_of
from sublet._declare.types import R, TaskType
from sublet._errors import TaskRunError
from sublet_protocol import ids
from sublet_protocol.messages import Grant, TaskError
from sublet_protocol.raw_json import json_bytes

if TYPE_CHECKING:
    from sublet._declare.task import Task


current_context: ContextVar[Context | None] = ContextVar("sublet_current_context", default=None)
"""The context of the running task; None outside of tasks. The worker copies it into the threads of sync tasks."""

offline: ContextVar[str | None] = ContextVar("sublet_offline", default=None)
"""Text of the error that clients raise when they are used here; None where they may be used."""


@dataclass(frozen=True, slots=True)
class ChildSpawn:
    """A child run that a durable task starts.

    ``await ctx._aio_spawn(spawns, wait)`` of a durable context starts them and returns a list in their order:

    * ``wait=True``: the result of ``decode`` for the output of each child. For a child that failed or was cancelled:
      its `TaskRunError` as a value, which the caller raises or returns (``return_exceptions``).
    * ``wait=False``: the run ids of the children, once they are recorded.
    """

    workflow: str
    """Name with its namespace."""
    input_json: bytes = b"{}"
    metadata: dict[str, object] = field(default_factory=dict)
    """Already merged with the metadata of the parent."""
    priority: int | None = None
    child_key: str | None = None
    decode: Callable[[bytes | None], Any] = lambda raw: raw
    """Turns the output of the child into the value that the user gets. The output is that of the task for a workflow of
    one task, else ``{task name: output}``; None for no output."""


class TaskServices(Protocol):
    """What the worker does for the code of one task. Methods are called on the event loop of the worker."""

    @property
    def worker_id(self) -> str: ...

    @property
    def worker_labels(self) -> Mapping[str, str | int]: ...

    @property
    def lifespan(self) -> Any: ...

    @property
    def config(self) -> ClientConfig: ...

    @property
    def is_cancelled(self) -> bool: ...

    def now(self) -> float:
        """The time in Unix seconds."""

    def release_slot(self) -> asyncio.Future[None]: ...

    def extend(self, by_s: float) -> asyncio.Future[None]: ...

    def cancel(self) -> asyncio.Future[None]: ...

    def from_sync(self, start: Callable[[], asyncio.Future[None]]) -> None:
        """Call ``start`` on the event loop of the worker. From another thread: block until its future has ended."""


class Context:
    """The context of one attempt of a task: ids, metadata, outputs of parents, and requests to Sublet."""

    is_durable = False

    def __init__(self, grant: Grant, task: Task[Any, Any], services: TaskServices) -> None:
        self._grant = grant
        self._task = task
        self._services = services
        self._children = itertools.count()

    # --- who this is ----------------------------------------------------------------------------------------------

    @property
    def workflow_run_id(self) -> str:
        return ids.run_of(self._grant.lease)

    @property
    def task_run_id(self) -> str:
        return ids.task_run_of(self._grant.lease)

    @property
    def workflow_id(self) -> str:
        """The name of the workflow, which identifies it."""
        return self._grant.workflow

    @property
    def workflow_name(self) -> str:
        return self._grant.workflow

    @property
    def workflow_version_id(self) -> str:
        """The version of the workflow with which the run was started."""
        return self._grant.version

    @property
    def task_name(self) -> str:
        return self._grant.task

    @property
    def worker_id(self) -> str:
        return self._services.worker_id

    @property
    def worker_labels(self) -> dict[str, str | int]:
        return dict(self._services.worker_labels)

    @property
    def retry_count(self) -> int:
        """Number of retries so far; 0 in the first attempt."""
        return self._grant.retry_count

    @property
    def attempt_number(self) -> int:
        """Number of this attempt; 1 for the first."""
        return self._grant.retry_count + 1

    @property
    def max_attempts(self) -> int:
        return self._task.retries + 1

    @property
    def additional_metadata(self) -> dict[str, Any]:
        return dict(self._grant.metadata)

    @property
    def priority(self) -> int:
        return self._grant.priority

    @property
    def parent_workflow_run_id(self) -> str | None:
        """The run whose task started this run; None if no task did."""
        return ids.run_of(self._grant.parent.task_run_id) if self._grant.parent is not None else None

    @property
    def child_index(self) -> int | None:
        return self._grant.child_index

    @property
    def child_key(self) -> str | None:
        return self._grant.child_key

    @property
    def lifespan(self) -> Any:
        """The value that the lifespan function of the worker yielded."""
        return self._services.lifespan

    @property
    def is_cancelled(self) -> bool:
        """True when the task should stop. Sync code has to check this; async code is cancelled a moment later."""
        return self._services.is_cancelled

    # --- what started the run -------------------------------------------------------------------------------------

    @property
    def was_triggered_by_event(self) -> bool:
        return self._grant.trigger is not None

    @property
    def triggering_event_id(self) -> str | None:
        return self._grant.trigger.event_id if self._grant.trigger is not None else None

    @property
    def triggering_event_key(self) -> str | None:
        return self._grant.trigger.event_key if self._grant.trigger is not None else None

    @property
    def filter_payload(self) -> dict[str, Any]:
        """The payload of the filter that let the event start this run."""
        return dict(self._grant.trigger.filter_payload) if self._grant.trigger is not None else {}

    # --- results of other tasks ---------------------------------------------------------------------------------

    def task_output(self, task: Task[Any, R]) -> R:
        """The output of a parent, as the return type of its function.

        Raises:
            ValueError: the parent was skipped, or ``task`` is not a parent of this task.
            pydantic.ValidationError: the output does not fit the return type.
        """
        if self.was_skipped(task):
            raise ValueError(f"task {task.name!r} was skipped, so it has no output; ask ctx.was_skipped(task) first")
        if task.name not in self._grant.parents:
            cure = (
                "an on-failure task has no parents; ctx.task_run_errors holds the errors"
                if self._task.type is TaskType.ON_FAILURE
                else "add it to parents=[…]"
            )
            raise ValueError(f"task {task.name!r} is none of the parents of {self.task_name!r}: {cure}")
        return task.decode_output(json_bytes(self._grant.parents[task.name]))

    def was_skipped(self, task: Task[Any, Any]) -> bool:
        return task.name in self._grant.skipped

    @property
    def task_run_errors(self) -> dict[str, str]:
        """In an on-failure task: the error of each failed task, by task name."""
        return {name: str(_raised(error)) for name, error in self._grant.errors.items()}

    def get_task_run_error(self, task: Task[Any, Any]) -> TaskRunError | None:
        error = self._grant.errors.get(task.name)
        return _raised(error) if error is not None else None

    # --- requests --------------------------------------------------------------------------------------

    def release_slot(self) -> None:
        """Free the slot of this task, which continues to run. Another task can then start on this worker.

        Call it when the remaining work (an upload, a poll) should not count against the slots of the worker. The task
        can still be cancelled and timed out, and is run again on another worker if this one dies. A second call does
        nothing. In async code this method returns at once and the slot is freed soon; `aio_release_slot` waits for it.
        """
        self._services.from_sync(self._services.release_slot)

    async def aio_release_slot(self) -> None:
        """Like `release_slot`, for async code. Returns when the slot is free."""
        await asyncio.shield(self._services.release_slot())

    def refresh_timeout(self, increment_by: Duration) -> None:
        """Extend the execution timeout of this attempt.

        Raises:
            ValueError: the duration is not longer than zero, or not understood.
        """
        by_s = positive_seconds_of(increment_by, "increment_by")
        self._services.from_sync(lambda: self._services.extend(by_s))

    async def aio_refresh_timeout(self, increment_by: Duration) -> None:
        """Like `refresh_timeout`, for async code. Returns when the extension is confirmed."""
        await asyncio.shield(self._services.extend(positive_seconds_of(increment_by, "increment_by")))

    def cancel(self) -> None:
        """Cancel this task. Its run continues as after a cancellation by ``client.runs``."""
        self._services.from_sync(self._services.cancel)

    async def aio_cancel(self) -> None:
        """Like `cancel`, for async code. Returns when the cancellation is confirmed."""
        await asyncio.shield(self._services.cancel())

    def log(self, line: str | Mapping[str, Any], raise_on_error: bool = False) -> None:
        """Write a line at level INFO to the logger ``sublet.task``, with the ids of run and task in ``extra``.

        Args:
            line: a text, or anything that can be written as JSON.
            raise_on_error: False logs the ``repr`` of a line that cannot be written as JSON.

        Raises:
            TypeError: the line cannot be written as JSON, and ``raise_on_error`` is true.
        """
        try:
            text = line if isinstance(line, str) else to_json(line).decode()
        except ValueError as error:
            if raise_on_error:
                raise TypeError(f"the log line cannot be written as JSON: {error}") from error
            text = repr(line)
        logging.getLogger("sublet.task").info(
            text,
            extra={
                "workflow_run_id": self.workflow_run_id,
                "task_run_id": self.task_run_id,
                "workflow": self.workflow_name,
                "task": self.task_name,
                "retry_count": self.retry_count,
            },
        )

    async def aio_log(self, line: str | Mapping[str, Any], raise_on_error: bool = False) -> None:
        """Like `log`."""
        self.log(line, raise_on_error)

    # --- for the client -------------------------------------------------------------------------------------------

    def _next_child_index(self) -> int:
        """Number of the next child of this attempt, from 0. Safe to call from any thread."""
        return next(self._children)


def _raised(error: TaskError) -> TaskRunError:
    return TaskRunError(error.message, error.type, error.trace, error.task_run_id)
