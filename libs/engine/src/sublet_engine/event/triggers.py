"""Which runs an event starts: patterns of event keys, then filters."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Protocol

import msgspec

from sublet_engine.event.intake import Event, ParsedEvent
from sublet_engine.run.effects import position_at
from sublet_protocol import ids
from sublet_protocol.cel.expressions import FILTER_VARIABLES, Expression, ExpressionError, compile_expression
from sublet_protocol.messages import RunRequest, Trigger
from sublet_protocol.specs import EventFilter


class Triggering(Protocol):
    """What starts a run of a workflow: event keys or patterns of them, and filters."""

    @property
    def workflow(self) -> str: ...
    @property
    def on_events(self) -> tuple[str, ...]: ...
    @property
    def filters(self) -> tuple[EventFilter, ...]: ...


class Triggers:
    """The triggers of all workflows.

    Attributes:
        failures: number of filter evaluations that ended in an error or gave no boolean.
    """

    def __init__(self, records: Iterable[Triggering]) -> None:
        self.failures = 0
        self._by_key: dict[str, dict[str, _Filters]] = {}
        self._by_pattern: list[tuple[str, str, _Filters]] = []
        for record in records:
            filters = _Filters(record.filters)
            for pattern in record.on_events:
                if "*" in pattern:
                    self._by_pattern.append((pattern, record.workflow, filters))
                else:
                    self._by_key.setdefault(pattern, {})[record.workflow] = filters

    def runs(self, parsed_event: ParsedEvent[Event]) -> list[RunRequest]:
        """The runs that the event starts, ordered by workflow. Their ids are derived from event, workflow and filter.

        A workflow without filters gets one run. One with filters gets a run for each filter of the event's scope
        whose expression is true, and none if there is no such filter.
        """
        event = parsed_event.event
        workflows = dict(self._by_key.get(event.key, {}))
        workflows.update((name, filters) for pattern, name, filters in self._by_pattern if covers(pattern, event.key))
        runs = []
        for workflow, filters in sorted(workflows.items()):
            if filters.empty:
                runs.append(_run(event, workflow))
                continue
            for key, event_filter in filters.of_scope(event.scope).items():
                if self._lets_through(key, event_filter, filters, parsed_event):
                    runs.append(_run(event, workflow, key, event_filter.payload))
        return runs

    def _lets_through(
        self, key: str, event_filter: EventFilter, filters: _Filters, parsed_event: ParsedEvent[Event]
    ) -> bool:
        expression = filters.expressions.get(key)
        facts = parsed_event.facts_for_filter(event_filter.payload)
        verdict = None if expression is None else expression.verdict(facts)
        self.failures += verdict is None
        return verdict is True


class _Filters:
    """The filters of one workflow by scope, without duplicates, with compiled expressions."""

    def __init__(self, filters: Iterable[EventFilter]) -> None:
        self.empty = True
        self.expressions: dict[str, Expression] = {}
        """By filter key. An expression that cannot be compiled is missing, and its filter lets no event through."""
        self._by_scope: dict[str, dict[str, EventFilter]] = {}
        for event_filter in filters:
            self.empty = False
            key = filter_key(event_filter)
            self._by_scope.setdefault(event_filter.scope, {})[key] = event_filter
            try:
                self.expressions[key] = compile_expression(event_filter.expression, FILTER_VARIABLES)
            except ExpressionError:
                continue

    def of_scope(self, scope: str | None) -> Mapping[str, EventFilter]:
        return {} if scope is None else self._by_scope.get(scope, {})


def filter_key(event_filter: EventFilter) -> str:
    """A digest of the filter, so that equal filters of a workflow start one run."""
    return hashlib.blake2b(msgspec.json.encode(event_filter, order="deterministic"), digest_size=16).hexdigest()


def covers(pattern: str, key: str) -> bool:
    """Whether the event key matches the pattern, in which ``*`` matches any number of characters."""
    first, *others = pattern.split("*")
    if not others:
        return pattern == key
    *middle, last = others
    if not key.startswith(first):
        return False
    position = len(first)
    for part in middle:
        found = key.find(part, position)
        if found < 0:
            return False
        position = found + len(part)
    return key.endswith(last) and len(key) - len(last) >= position


def _run(event: Event, workflow: str, key: str = "", payload: Mapping[str, object] | None = None) -> RunRequest:
    return RunRequest(
        run_id=ids.triggered_run_id(event.id, workflow, key),
        workflow=workflow,
        input=msgspec.Raw(event.payload.encode()),
        metadata=dict(event.metadata),
        priority=event.priority,
        trigger=Trigger(event.id, event.key, dict(payload or {})),
        requested_at=_after(event),
    )


def _after(event: Event) -> float:
    """The start of the run: when the event was seen, or just after the event if the run would receive it otherwise."""
    return event.seen_at if position_at(event.seen_at) >= event.seq else (event.seq + 1) / 1_000_000
