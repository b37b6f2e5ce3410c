"""Conditions that a task can wait for: a duration, an event, the output of a parent, and or-groups of these."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

from sublet._client.config import ClientConfig
from sublet._declare.durations import Duration, seconds_of, text_of
from sublet._declare.serialization import check_name
from sublet_protocol import specs
from sublet_protocol.cel.expressions import EVENT_VARIABLES, PARENT_VARIABLES, compile_expression

if TYPE_CHECKING:
    from sublet._declare.task import Task


class Condition:
    """Base class of conditions. ``readable_data_key`` is the key of the condition in results; unique within a task."""

    readable_data_key: str

    def spec(self, config: ClientConfig) -> specs.Condition:
        """The condition in the form that is sent to the schedulers. Event keys get the namespace."""
        raise NotImplementedError


class SleepCondition(Condition):
    """True when ``duration`` has passed.

    Args:
        duration: a timedelta, or a text such as ``"5m"``.
        readable_data_key: None: ``sleep:<duration>``.

    Raises:
        ValueError: the duration is negative or not understood.
    """

    def __init__(self, duration: Duration, readable_data_key: str | None = None) -> None:
        self.duration = duration
        self.duration_s = seconds_of(duration, "the duration of a sleep")
        self.readable_data_key = check_name(readable_data_key or f"sleep:{text_of(duration)}", "readable_data_key")

    def spec(self, config: ClientConfig) -> specs.SleepCondition:
        return specs.SleepCondition(key=self.readable_data_key, duration_s=self.duration_s)


class UserEventCondition(Condition):
    """True when an event arrives that has this key and for which the expression is true.

    Args:
        event_key: the key of the event, without namespace.
        expression: CEL. The payload is ``input``: ``"input.order_id == 42"``. None: every event with this key counts.
        readable_data_key: None: the key of the event.
        scope: only events with this scope count. None: events of any scope count.
        consider_events_since: events that arrived after this time count too. A time without zone is local time.

    Raises:
        ValueError: the expression is not valid CEL.
    """

    def __init__(
        self,
        event_key: str,
        expression: str | None = None,
        readable_data_key: str | None = None,
        scope: str | None = None,
        consider_events_since: datetime | None = None,
    ) -> None:
        self.event_key = check_name(event_key, "event_key")
        self.expression = expression
        self.readable_data_key = check_name(readable_data_key or event_key, "readable_data_key")
        self.scope = scope
        self.consider_events_since = consider_events_since
        if expression is not None:
            compile_expression(expression, EVENT_VARIABLES)

    def spec(self, config: ClientConfig) -> specs.EventCondition:
        since = self.consider_events_since
        return specs.EventCondition(
            key=self.readable_data_key,
            event_key=config.apply_namespace(self.event_key),
            expression=self.expression,
            scope=self.scope,
            since_s=since.timestamp() if since else None,
        )


class ParentCondition(Condition):
    """True if the expression is true for the output of a completed parent. Only for tasks of a DAG.

    Args:
        parent: one of the ``parents`` of the task.
        expression: CEL. The output of the parent is ``output``: ``"output.total > 100"``.
        readable_data_key: None: the name of the parent.

    Raises:
        ValueError: the expression is not valid CEL.
    """

    def __init__(
        self, parent: Task[Any, Any], expression: str | None = None, readable_data_key: str | None = None
    ) -> None:
        self.parent = parent
        self.expression = expression
        self.readable_data_key = check_name(readable_data_key or parent.name, "readable_data_key")
        if expression is not None:
            compile_expression(expression, PARENT_VARIABLES)

    def spec(self, config: ClientConfig) -> specs.ParentCondition:
        return specs.ParentCondition(key=self.readable_data_key, parent=self.parent.name, expression=self.expression)


@dataclass(frozen=True)
class OrGroup:
    """True as soon as one of its conditions is true. Made by `or_`."""

    conditions: tuple[Condition, ...]


def or_(*conditions: Condition) -> OrGroup:
    """A group that is true as soon as one of its conditions is true: ``wait_for=[or_(SleepCondition("1h"), paid)]``.

    Raises:
        ValueError: there is no condition.
        TypeError: an argument is not a condition.
    """
    if not conditions:
        raise ValueError("or_() needs at least one condition")
    for condition in conditions:
        if not isinstance(condition, Condition):
            raise TypeError(f"or_() takes conditions, not {type(condition).__name__}")
    return OrGroup(conditions)


def groups(conditions: Iterable[Condition | OrGroup] | None) -> tuple[tuple[Condition, ...], ...]:
    """Convert the list of a user to or-groups, all of which must be true."""
    or_groups: list[tuple[Condition, ...]] = []
    for entry in conditions or ():
        if isinstance(entry, OrGroup):
            or_groups.append(entry.conditions)
        elif isinstance(entry, Condition):
            or_groups.append((entry,))
        else:
            raise TypeError(f"expected a condition or or_(…), not {type(entry).__name__}: {entry!r}")
    return tuple(or_groups)


def flat(conditions: Iterable[Condition | OrGroup] | None) -> list[Condition]:
    """All conditions of the list, including those in or-groups."""
    return [condition for group in groups(conditions) for condition in group]


def spec_of(conditions: Iterable[Condition | OrGroup] | None, config: ClientConfig) -> specs.Groups:
    """The list in the form that is sent to the schedulers."""
    return tuple(tuple(condition.spec(config) for condition in group) for group in groups(conditions))


def check_unique_keys(lists: Sequence[Iterable[Condition | OrGroup] | None], where: str) -> None:
    """Check that the conditions of one task have different keys. ``where`` names the task in the error.

    Raises:
        ValueError: two conditions have the same readable key.
    """
    keys = Counter(condition.readable_data_key for conditions in lists for condition in flat(conditions))
    twice = sorted(key for key, count in keys.items() if count > 1)
    if twice:
        raise ValueError(
            f"the conditions of {where} must have different keys; given twice: {', '.join(map(repr, twice))}. "
            "Give one of them a readable_data_key."
        )
