"""The exceptions that the SDK raises for users.

SubletError
├── NonRetryableException            raised by a task: do not retry
├── TaskRunError                     how one task failed
├── NonDeterminismError              a durable task differs from its log
├── IllegalTaskOutputError           an output cannot be stored
├── LifespanSetupError               the lifespan of a worker failed
├── LoopAlreadyRunningError          a blocking call inside an event loop
├── TransportUnavailable             also a ConnectionError
├── FailedTaskRunExceptionGroup      also a ValueError
├── UnknownWorkflowError             also a ValueError
├── RunCancelledError                also a ValueError
├── RunNotFoundError                 also a ValueError
└── sublet.testing.NothingWillHappen

Wrong arguments raise Python's own ``ValueError`` and ``TypeError``, and input of another type raises
``pydantic.ValidationError``: these are mistakes of the program, which nobody should have to catch.
"""

from __future__ import annotations

import json
import traceback
from collections.abc import Sequence


class SubletError(Exception):
    """The base class of all exceptions that Sublet defines: ``except SubletError`` catches each of them."""


class NonRetryableException(SubletError):
    """Raise it (or a subclass) in a task to fail at once, however many retries are left."""


class TransportUnavailable(SubletError, ConnectionError):
    """RabbitMQ did not confirm a message in time, or no scheduler answered a question in time.

    The message may or may not have arrived.
    """


class TaskRunError(SubletError):
    """The error of one failed task.

    Attributes:
        exc: the text of the exception.
        exc_type: the name of its class, such as ``"ValueError"``; ``"SubletError"`` if it is not known.
        trace: the traceback as text; empty if there is none.
        task_run_external_id: the id of the failed task run; empty if it is not known.
    """

    def __init__(self, exc: str, exc_type: str, trace: str = "", task_run_external_id: str = "") -> None:
        super().__init__(exc, exc_type, trace, task_run_external_id)
        self.exc = exc
        self.exc_type = exc_type
        self.trace = trace
        self.task_run_external_id = task_run_external_id

    def __str__(self) -> str:
        return f"{self.exc_type}: {self.exc}" + (f"\n{self.trace}" if self.trace else "")

    def __repr__(self) -> str:
        return f"TaskRunError({self.exc!r}, {self.exc_type!r}, task_run_external_id={self.task_run_external_id!r})"

    def serialize(self, include_metadata: bool) -> str:
        """The error as text: ``Type: message`` and the trace.

        ``include_metadata`` adds a line of JSON with the id of the task run.
        """
        text = str(self)
        if not include_metadata:
            return text
        return f"{text}\n{json.dumps({'task_run_external_id': self.task_run_external_id})}"

    @classmethod
    def deserialize(cls, serialized: str) -> TaskRunError:
        """The reverse of `serialize`. Text of another form becomes the message of an error of type ``SubletError``."""
        text, _, last = serialized.strip().rpartition("\n")
        try:
            task_run_external_id = json.loads(last)["task_run_external_id"] or ""
        except (ValueError, KeyError, TypeError):
            text, task_run_external_id = serialized.strip(), ""
        head, _, trace = text.partition("\n")
        exc_type, colon, exc = head.partition(": ")
        if not colon or not exc_type.isidentifier():
            return cls(text, "SubletError", "", task_run_external_id)
        return cls(exc, exc_type, trace, task_run_external_id)

    @classmethod
    def from_exception(cls, exc: BaseException, task_run_external_id: str = "") -> TaskRunError:
        """The error for an exception, with its traceback. A `TaskRunError` is returned unchanged."""
        if isinstance(exc, cls):
            return exc
        trace = "".join(traceback.format_exception(exc))
        return cls(str(exc), type(exc).__name__, trace, task_run_external_id)


class FailedTaskRunExceptionGroup(SubletError, ValueError):
    """A run failed. ``exceptions`` holds one `TaskRunError` for each failed task; ``message`` says which run failed."""

    def __init__(self, message: str, exceptions: Sequence[TaskRunError]) -> None:
        super().__init__(message, list(exceptions))
        self.message = message
        self.exceptions = list(exceptions)

    def __str__(self) -> str:
        return "\n".join([self.message, *(f"- {error}" for error in self.exceptions)])


class UnknownWorkflowError(SubletError, ValueError):
    """A run was requested of a workflow that no worker has ever registered."""


class RunCancelledError(SubletError, ValueError):
    """The run whose result was requested was cancelled."""


class RunNotFoundError(SubletError, ValueError):
    """There is no run with this id."""


class NonDeterminismError(SubletError):
    """A durable task asked for another operation than the recorded one.

    Either its code was changed between two invocations, or it depends on something that is not in the durable log: the
    time, random numbers or global variables.

    Attributes:
        task_external_id: the id of the task run.
        invocation_count: the invocation that failed; 1 for the first.
        message: what is recorded, and what the code asked for.
        node_id: the operation id.
    """

    def __init__(self, task_external_id: str, invocation_count: int, message: str, node_id: str) -> None:
        super().__init__(task_external_id, invocation_count, message, node_id)
        self.task_external_id = task_external_id
        self.invocation_count = invocation_count
        self.message = message
        self.node_id = node_id

    def __str__(self) -> str:
        return self.message


class IllegalTaskOutputError(SubletError):
    """A task returned a value that cannot be stored as its output. The text says why and what to do."""


class LifespanSetupError(SubletError):
    """The lifespan function of a worker failed before its ``yield``."""


class LoopAlreadyRunningError(SubletError):
    """``worker.start()`` was called on a running event loop. It blocks, so use ``await worker.aio_start()`` there."""
