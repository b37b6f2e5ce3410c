"""Which task this code is running in, and what a durable task needs to know to start a child."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sublet._worker.context import Context

current_context: ContextVar[Context | None] = ContextVar("sublet_current_context", default=None)
"""The context of the running task; None outside of tasks. The worker copies it into the threads of sync tasks."""

offline: ContextVar[str | None] = ContextVar("sublet_offline", default=None)
"""Why the client must not be used in here; None: it may."""


@dataclass(frozen=True, slots=True)
class ChildSpawn:
    """A child that a durable task asks for.

    A durable context takes these by ``await ctx._aio_spawn(spawns, wait)``, which gives a list in their order:

    * ``wait=True``: what ``decode`` makes of each child's output, or, for a child that failed or was cancelled,
      its `TaskRunError` as a value (it is the caller who raises it, or with ``return_exceptions`` does not);
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
    """From the child's output as its parent sees it (bare for a workflow of one task, else ``{task name: output}``;
    None for no output) to the value that the user gets."""
