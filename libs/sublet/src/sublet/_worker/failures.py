"""How an exception of a task travels."""

from __future__ import annotations

from sublet._errors import NonRetryableException, TaskRunError
from sublet_protocol import limits
from sublet_protocol.messages import TaskError


def task_error(error: BaseException, task_run_id: str) -> TaskError:
    """Its class, text and trace, cut to what can be stored. Of a long trace the end is kept: there it was raised."""
    failed = TaskRunError.from_exception(error, task_run_id)
    return TaskError(
        type=failed.exc_type,
        message=failed.exc[: limits.ERROR_TEXT_MAX_CHARS],
        trace=failed.trace[-limits.ERROR_TEXT_MAX_CHARS :],
        task_run_id=task_run_id,
    )


def is_retryable(error: BaseException) -> bool:
    return not isinstance(error, NonRetryableException)
