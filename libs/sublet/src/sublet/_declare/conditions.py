"""What a task may wait for: a time, an event, the output of a parent, and or-groups of these."""

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
    """Something that comes true. ``readable_data_key`` names it in results, and must be unique within one task."""

    readable_data_key: str

    def spec(self, config: ClientConfig) -> specs.Condition:
        """As it travels; the namespace is put before event keys."""
        raise NotImplementedError


class SleepCondition(Condition):
    """True once ``duration`` has passed. The key is ``sleep:<duration>`` unless one is given."""

    def __init__(self, duration: Duration, readable_data_key: str | None = None) -> None:
        self.duration = duration
        self.duration_s = seconds_of(duration, "the duration of a sleep")
        self.readable_data_key = check_name(readable_data_key or f"sleep:{text_of(duration)}", "readable_data_key")

    def spec(self, config: ClientConfig) -> specs.SleepCondition:
        return specs.SleepCondition(key=self.readable_data_key, duration_s=self.duration_s)


class UserEventCondition(Condition):
    """True once an event with the key ``event_key`` arrives for which ``expression`` holds.

    ``expression`` is CEL; it sees the payload as ``input``: ``"input.order_id == 42"``. With a ``scope`` only events of
    that scope count. ``consider_events_since`` also takes events that arrived after that time (a time without zone is
    local time). The key is the event's key unless one is given.

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
    """True if ``expression`` holds when the parent is done: CEL that sees the parent's output as ``output``.

    Only for tasks of a DAG, and only about one of their ``parents``. The key is the parent's name unless one is given.

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
    """True as soon as one of its conditions is."""

    conditions: tuple[Condition, ...]


def or_(*conditions: Condition) -> OrGroup:
    """A group that is true as soon as one of the conditions is: ``wait_for=[or_(SleepCondition("1h"), paid)]``.

    Raises:
        ValueError: no condition was given.
    """
    if not conditions:
        raise ValueError("or_() needs at least one condition")
    for condition in conditions:
        if not isinstance(condition, Condition):
            raise TypeError(f"or_() takes conditions, not {type(condition).__name__}")
    return OrGroup(conditions)


def groups(conditions: Iterable[Condition | OrGroup] | None) -> tuple[tuple[Condition, ...], ...]:
    """The list as users write it, as AND of or-groups."""
    made: list[tuple[Condition, ...]] = []
    for entry in conditions or ():
        if isinstance(entry, OrGroup):
            made.append(entry.conditions)
        elif isinstance(entry, Condition):
            made.append((entry,))
        else:
            raise TypeError(f"expected a condition or or_(…), not {type(entry).__name__}: {entry!r}")
    return tuple(made)


def flat(conditions: Iterable[Condition | OrGroup] | None) -> list[Condition]:
    """All conditions of the list, those in or-groups too."""
    return [condition for group in groups(conditions) for condition in group]


def spec_of(conditions: Iterable[Condition | OrGroup] | None, config: ClientConfig) -> specs.Groups:
    """The list as it travels."""
    return tuple(tuple(condition.spec(config) for condition in group) for group in groups(conditions))


def check_unique_keys(lists: Sequence[Iterable[Condition | OrGroup] | None], where: str) -> None:
    """
    Raises:
        ValueError: two conditions have the same readable key; the text names it.
    """
    keys = Counter(condition.readable_data_key for conditions in lists for condition in flat(conditions))
    twice = sorted(key for key, count in keys.items() if count > 1)
    if twice:
        raise ValueError(
            f"the conditions of {where} must have different keys; given twice: {', '.join(map(repr, twice))}. "
            "Give one of them a readable_data_key."
        )
