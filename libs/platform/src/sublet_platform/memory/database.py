"""One database in memory, shared by the stores of all processes of a test."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from sublet_engine.run.state import LogRecord, Run
from sublet_platform.ports import (
    StoredEvent,
    StoredSubscription,
    StoredTimer,
    TriggerRecord,
    WorkerRecord,
    WorkflowRecord,
)

Interruption = Callable[[str], Awaitable[None]]
"""Called with the name of the operation. It may sleep (a slow database) or raise StoreUnavailable."""


async def _undisturbed(operation: str) -> None:
    """The default: the database answers at once."""


class MemoryDatabase:
    """The contents, and two hooks.

    Attributes:
        before: awaited before an operation takes effect: what it raises means that nothing was done.
        after: awaited after it took effect, before the caller learns of it: what it raises is a lost answer.
    """

    def __init__(self) -> None:
        self.before: Interruption = _undisturbed
        self.after: Interruption = _undisturbed
        self.runs: dict[str, Run] = {}
        self.log: dict[str, LogRecord] = {}
        self.log_of: dict[str, list[LogRecord]] = {}
        self.workflows: dict[tuple[str, str], WorkflowRecord] = {}
        self.workers: dict[str, WorkerRecord] = {}
        self.schedulers: dict[str, float] = {}
        self.settings: dict[str, int | str] | None = None
        self.timers: dict[str, StoredTimer] = {}
        self.events: dict[str, StoredEvent] = {}
        self.advanced_seq = 0
        self.subscriptions: dict[str, StoredSubscription] = {}
        self.field_sets: dict[str, list[tuple[str, ...]]] = {}
        self.triggers: dict[str, tuple[float, TriggerRecord]] = {}
