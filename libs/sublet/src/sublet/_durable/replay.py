"""The durable log of one invocation, and the check that the code repeats the recorded operations."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import msgspec
from pydantic_core import to_json

from sublet._errors import NonDeterminismError
from sublet_protocol import ids
from sublet_protocol.messages import ChildRequest, Completion, Grant, LogEntry, Operation
from sublet_protocol.specs import Condition, EventCondition, Groups, SleepCondition

FINGERPRINT_DIGITS = 16
"""Hexadecimal digits of a fingerprint: 64 bits, because a log is compared with one other operation at a time."""

SHOWN_MAX_CHARS = 120
"""Characters of an input that an error text shows."""


class Log:
    """The durable log of one invocation.

    Results have an *order*: 1 for the operation of the task that ended first, and so on.

    Attributes:
        received: all results up to this order have arrived here, delivered to the code or not.
    """

    def __init__(self, grant: Grant) -> None:
        self._task_run_id = ids.task_run_of(grant.lease)
        self._invocation = grant.invocation
        self._entries: dict[str, LogEntry | Operation] = {entry.operation_id: entry for entry in grant.log}
        self._done: dict[str, Completion] = {}
        self._operation_id_by_order: dict[int, str] = {}
        self._asked: set[str] = set()
        self._new: list[Operation] = []
        self._first_unasked = 1
        self.received = 0
        for entry in grant.log:
            if entry.done is not None:
                self.end(entry.operation_id, entry.done)

    def ask(self, operation: Operation) -> None:
        """The code asks for this operation. It must be the recorded one with this operation id, or a new one.

        Raises:
            NonDeterminismError: another operation is recorded with this operation id.
        """
        self._asked.add(operation.operation_id)
        if self._recorded(operation) is None:
            self._entries[operation.operation_id] = operation
            self._new.append(operation)

    def recall(self, memo: Operation) -> bytes | None:
        """The recorded value of this memo, as JSON; None if it is new.

        Raises:
            NonDeterminismError: another operation is recorded with this operation id.
        """
        recorded = self._recorded(memo)
        if recorded is None:
            return None
        self._asked.add(memo.operation_id)
        return bytes(recorded.result)

    def _recorded(self, operation: Operation) -> LogEntry | Operation | None:
        recorded = self._entries.get(operation.operation_id)
        if recorded is not None and (recorded.kind, recorded.fingerprint) != (operation.kind, operation.fingerprint):
            version = f" by version {recorded.version}" if isinstance(recorded, LogEntry) and recorded.version else ""
            message = (
                f"operation {operation.operation_id} of {self._task_run_id}: recorded{version} is {recorded.asked}, "
                f"but invocation {self._invocation} asks for {operation.asked}. The code must ask for the"
                " same operations in each invocation: take times from ctx.aio_now() and other changing values from"
                " ctx.aio_memo()"
            )
            raise NonDeterminismError(self._task_run_id, self._invocation, message, operation.operation_id)
        return recorded

    def end(self, operation_id: str, done: Completion) -> None:
        """Add the result of an operation. A second result of the same operation is ignored."""
        if operation_id in self._done:
            return
        self._done[operation_id] = done
        self._operation_id_by_order[done.order] = operation_id
        while self.received + 1 in self._operation_id_by_order:
            self.received += 1

    def done(self, operation_id: str) -> Completion:
        """The result of an ended operation."""
        return self._done[operation_id]

    def rank(self, operation_ids: Iterable[str]) -> int | None:
        """The highest order of these results. None while one of them, or a result of a lower order, is missing."""
        rank = 0
        for operation_id in operation_ids:
            done = self._done.get(operation_id)
            if done is None or done.order > self.received:
                return None
            rank = max(rank, done.order)
        return rank

    def runs_ahead(self, rank: int) -> bool:
        """An operation that ended before ``rank`` is not asked for yet, although it was in an earlier invocation."""
        while self._operation_id_by_order.get(self._first_unasked) in self._asked:
            self._first_unasked += 1
        return self._first_unasked < rank

    @property
    def has_new_operation(self) -> bool:
        """There is a new operation other than a memo. (Memos are recorded with the next report.)"""
        return any(operation.kind != "memo" for operation in self._new)

    def take_new(self) -> tuple[Operation, ...]:
        """Return the new operations, which are then no longer new."""
        new, self._new = tuple(self._new), []
        return new


# --- operations, with a fingerprint for comparison and a text for humans ------------------------------------------


def wait_operation(operation_id: str, groups: Groups, since: int, label: str | None) -> Operation:
    """A wait until one condition of each group is true. The order of the conditions does not matter."""
    canonical = sorted(sorted(_canonical(condition) for condition in group) for group in groups)
    return Operation(
        operation_id=operation_id,
        kind="wait",
        fingerprint=_digest("wait", canonical),
        asked=" and ".join(_group_text(group) for group in groups),
        label=label,
        groups=groups,
        since=since,
    )


def run_operation(operation_id: str, child: ChildRequest) -> Operation:
    """A child run. Its metadata and priority may differ between invocations."""
    key = f" with key {child.child_key!r}" if child.child_key is not None else ""
    return Operation(
        operation_id=operation_id,
        kind="run",
        fingerprint=_digest("run", [child.workflow, bytes(child.input).decode(), child.child_key]),
        asked=f"run workflow {child.workflow!r}{key} on input {_short(bytes(child.input).decode())}",
        child=child,
    )


def memo_operation(operation_id: str, name: str, arguments: object) -> Operation:
    """A memo of a call; its value is added later. Arguments that are not JSON are compared by their type."""
    text = to_json(arguments, fallback=lambda value: type(value).__qualname__, inf_nan_mode="constants").decode()
    return Operation(
        operation_id=operation_id,
        kind="memo",
        fingerprint=_digest("memo", [name, text]),
        asked=f"memo {name} on {_short(text)}",
    )


def _canonical(condition: Condition) -> str:
    """The fields that identify a condition, as text. ``since_s`` may differ: it is derived from recorded times."""
    if isinstance(condition, EventCondition):
        condition = msgspec.structs.replace(condition, since_s=None)
    return msgspec.json.encode(condition, order="deterministic").decode()


def _group_text(group: tuple[Condition, ...]) -> str:
    return " or ".join(_condition_text(condition) for condition in group)


def _condition_text(condition: Condition) -> str:
    if isinstance(condition, SleepCondition):
        return f"a sleep of {condition.duration_s:.15g} s"
    if isinstance(condition, EventCondition):
        where = f" where {condition.expression}" if condition.expression else ""
        scope = f" in scope {condition.scope!r}" if condition.scope is not None else ""
        return f"a wait for event {condition.event_key!r}{scope}{where}"
    return f"a wait for parent {condition.parent!r}"


def _digest(kind: str, asked: object) -> str:
    """A fingerprint of `FINGERPRINT_DIGITS` hexadecimal digits."""
    return hashlib.sha256(msgspec.json.encode([kind, asked], order="deterministic")).hexdigest()[:FINGERPRINT_DIGITS]


def _short(text: str) -> str:
    return text if len(text) <= SHOWN_MAX_CHARS else f"{text[: SHOWN_MAX_CHARS - 1]}…"
