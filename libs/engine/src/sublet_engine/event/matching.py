"""Which waits an event satisfies: first by match key, then by CEL.

A wait is indexed by event key, scope and the equality terms of its expression, all in one *match key*. So an event
costs the same for one wait on ``input.order_id == <n>`` as for a million of them. The *field sets* of an event key are
the sets of payload fields that its match keys contain; an event is looked up once for each field set.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple, Protocol

import msgspec

from sublet_engine.event.intake import Event, ParsedEvent
from sublet_protocol import limits
from sublet_protocol.cel.equality import Path, equality_terms, value_at
from sublet_protocol.cel.expressions import ExpressionError, compile_expression
from sublet_protocol.messages import EventMatched, Subscribe
from sublet_protocol.specs import EventCondition

FieldSet = tuple[str, ...]
"""Payload fields in order, each as a JSON pointer (``/user/id``). Waits without equality terms have the empty set."""

_NO_FIELDS: FieldSet = ()


class Wait(Protocol):
    """A subscription with the key it is indexed by."""

    @property
    def match_key(self) -> str: ...
    @property
    def subscribe(self) -> Subscribe: ...


class IndexKey(NamedTuple):
    field_set: FieldSet
    match_key: str


def match_key(event_key: str, scope: str | None, terms: Mapping[str, str]) -> str:
    """The match key of waits for this event key, with these canonical values by field (JSON pointer).

    The key is a digest, so its size does not depend on the values.
    """
    parts = msgspec.json.encode([event_key, scope, sorted(terms.items())])
    return hashlib.blake2b(parts, digest_size=16).hexdigest()


def index_key(condition: EventCondition, field_sets: Collection[FieldSet]) -> IndexKey:
    """The index key of a wait. ``field_sets``: those that its event key already has; their number is bounded.

    Raises:
        ExpressionError: the expression of the condition cannot be used.
    """
    terms: Mapping[str, str] = {}
    if condition.expression is not None:
        found = equality_terms(condition.expression)
        if not found.whole:
            compile_expression(condition.expression)
        terms = {_pointer(path): value for path, value in found.values.items()}
    field_set = tuple(sorted(terms))
    if field_set not in field_sets and len(field_sets) >= limits.MATCH_FIELD_SETS_MAX:
        field_set, terms = _NO_FIELDS, {}
    return IndexKey(field_set, match_key(condition.event_key, condition.scope, terms))


def lookup_keys(parsed_event: ParsedEvent[Event], field_sets: Iterable[FieldSet]) -> list[str]:
    """The match keys of all waits that the event may satisfy, given the field sets of its key.

    A wait with a scope needs exactly that scope; a wait without a scope accepts any.
    """
    event = parsed_event.event
    scopes = (None,) if event.scope is None else (None, event.scope)
    keys = []
    for field_set in sorted({_NO_FIELDS, *field_sets}):
        terms = _terms_held(parsed_event, field_set)
        if terms is not None:
            keys += [match_key(event.key, scope, terms) for scope in scopes]
    return keys


def _terms_held(parsed_event: ParsedEvent[Event], field_set: FieldSet) -> dict[str, str] | None:
    """The payload's values of these fields; None if a field is missing, so that no wait of this field set can match."""
    terms = {}
    for pointer in field_set:
        value = value_at(parsed_event.payload, _path(pointer))
        if value is None:
            return None
        terms[pointer] = value
    return terms


def _pointer(path: Path) -> str:
    return "".join("/" + name.replace("~", "~0").replace("/", "~1") for name in path)


def _path(pointer: str) -> Path:
    return tuple(name.replace("~1", "/").replace("~0", "~") for name in pointer.split("/")[1:])


def listens_from(subscribe: Subscribe) -> int:
    """The position after which the wait listens: only events with a greater seq can satisfy it."""
    condition = subscribe.condition
    if isinstance(condition, EventCondition) and condition.since_s is not None:
        start = max(condition.since_s, 0.0) * 1_000_000
        return subscribe.since if start > subscribe.since else int(start) - 1
    return subscribe.since


class Waits:
    """Open waits by match key. Each is satisfied at most once, by the first event that matches.

    Attributes:
        failures: number of evaluations that ended in an error or gave no boolean.
    """

    def __init__(self, waits: Iterable[Wait]) -> None:
        self.failures = 0
        self._open: dict[str, dict[str, Subscribe]] = {}
        for wait in waits:
            self._open.setdefault(wait.match_key, {})[wait.subscribe.id] = wait.subscribe

    def __bool__(self) -> bool:
        return bool(self._open)

    def starts(self) -> dict[str, int]:
        """By event key, the position after which its stored events must be searched for the open waits."""
        starts: dict[str, int] = {}
        for waits in self._open.values():
            for wait in waits.values():
                if isinstance(wait.condition, EventCondition):
                    key, start = wait.condition.event_key, listens_from(wait)
                    starts[key] = min(start, starts.get(key, start))
        return starts

    def satisfied_by(self, parsed_event: ParsedEvent[Event], keys: Sequence[str]) -> list[Subscribe]:
        """Take out the waits that this event satisfies. ``keys``: its `lookup_keys`."""
        satisfied = []
        for key in keys:
            waits = self._open.get(key)
            if not waits:
                continue
            fitting = [wait for wait in waits.values() if self._fits(wait, parsed_event)]
            for wait in fitting:
                del waits[wait.id]
            if not waits:
                del self._open[key]
            satisfied += fitting
        return satisfied

    def _fits(self, subscribe: Subscribe, parsed_event: ParsedEvent[Event]) -> bool:
        condition, event = subscribe.condition, parsed_event.event
        if not isinstance(condition, EventCondition) or condition.event_key != event.key:
            return False
        if condition.scope is not None and condition.scope != event.scope:
            return False
        if event.seq <= listens_from(subscribe):
            return False
        if condition.expression is None:
            return True
        terms = equality_terms(condition.expression)
        if terms.whole:
            return terms.hold(parsed_event.payload)
        try:
            verdict = compile_expression(condition.expression).verdict(parsed_event.facts)
        except ExpressionError:
            verdict = None
        self.failures += verdict is None
        return verdict is True


def event_matched(subscribe: Subscribe, event: Event) -> EventMatched:
    """The message to the shard of the task that waits."""
    return EventMatched(
        task_run_id=subscribe.task_run_id,
        operation_id=subscribe.operation_id,
        key=subscribe.condition.key,
        event_id=event.id,
        seq=event.seq,
        payload=msgspec.Raw(event.payload.encode()),
    )
