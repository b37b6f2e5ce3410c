"""Matching events with waits: by index key, then by scope, place and expression."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sublet_engine.event.intake import ParsedEvent
from sublet_engine.event.matching import FieldSet, Waits, event_matched, index_key, lookup_keys
from sublet_protocol import limits
from sublet_protocol.cel.expressions import ExpressionError
from sublet_protocol.messages import Subscribe
from sublet_protocol.specs import EventCondition


@dataclass(frozen=True)
class AnEvent:
    payload: str = "{}"
    key: str = "order.paid"
    scope: str | None = None
    seq: int = 100
    id: str = "e1"
    metadata: dict[str, object] = field(default_factory=dict)
    priority: int | None = None
    seen_at: float = 0.0


@dataclass(frozen=True)
class AWait:
    match_key: str
    subscribe: Subscribe


def parsed_event(payload: dict[str, Any] | None = None, **event: Any) -> ParsedEvent[AnEvent]:
    return ParsedEvent(AnEvent(payload=json.dumps(payload or {}), **event))


def condition(expression: str | None = None, scope: str | None = None, **more: Any) -> EventCondition:
    return EventCondition(key="c", event_key="order.paid", expression=expression, scope=scope, **more)


def wait(on: EventCondition, name: str = "w1", since: int = 0, field_sets: Collection[FieldSet] = ()) -> AWait:
    return AWait(index_key(on, field_sets).match_key, Subscribe(name, "run.task", "1", on, since))


def completed_count(waits: Sequence[AWait], event: ParsedEvent[AnEvent]) -> list[str]:
    field_sets = {
        index_key(wait.subscribe.condition, ()).field_set
        for wait in waits
        if isinstance(wait.subscribe.condition, EventCondition)
    }
    return [each.id for each in Waits(waits).satisfied_by(event, lookup_keys(event, field_sets))]


def test_a_wait_without_expression_takes_any_event_of_its_key() -> None:
    assert completed_count([wait(condition())], parsed_event()) == ["w1"]
    assert completed_count([wait(condition())], parsed_event(key="order.sent")) == []


@pytest.mark.parametrize(
    ("wanted", "given", "expected"),
    [
        (None, None, True),
        (None, "a", True),
        ("a", "a", True),
        ("a", "b", False),
        ("a", None, False),
        ("", None, False),
    ],
)
def test_a_scoped_wait_wants_its_scope_and_an_unscoped_one_takes_all(
    wanted: str | None, given: str | None, expected: bool
) -> None:
    assert bool(completed_count([wait(condition(scope=wanted))], parsed_event(scope=given))) is expected


def test_an_expression_decides() -> None:
    waits = [wait(condition("input.amount > 10"))]
    assert completed_count(waits, parsed_event({"amount": 11})) == ["w1"]
    assert completed_count(waits, parsed_event({"amount": 10})) == []


def test_an_expression_that_fails_on_a_payload_is_counted_and_disturbs_no_other_wait() -> None:
    failing, fine = wait(condition("input.missing > 10"), "bad"), wait(condition("input.amount > 10"), "good")
    event = parsed_event({"amount": 11})
    waits = Waits([failing, fine])
    assert [each.id for each in waits.satisfied_by(event, lookup_keys(event, ()))] == ["good"]
    assert waits.failures == 1


def test_equality_terms_are_part_of_the_key_so_that_other_waits_are_not_even_looked_at() -> None:
    def on(n: int) -> EventCondition:
        return condition(f"input.order_id == {n} && input.amount > 10")

    assert index_key(on(1), ()).field_set == ("/order_id",)
    event = parsed_event({"order_id": 1.0, "amount": 11})
    keys = lookup_keys(event, [("/order_id",)])
    assert index_key(on(1), ()).match_key in keys
    assert index_key(on(2), ()).match_key not in keys
    assert completed_count([wait(on(1), "one"), wait(on(2), "two")], event) == ["one"]


def test_an_event_without_a_field_of_a_shape_is_not_looked_up_by_it() -> None:
    assert lookup_keys(parsed_event({}), [("/order_id",)]) == lookup_keys(parsed_event({}), [])


def test_names_with_slashes_and_tildes_are_fields_too() -> None:
    on = condition('input["a/b"]["~c"] == 1')
    assert completed_count([wait(on)], parsed_event({"a/b": {"~c": 1}})) == ["w1"]


def test_the_number_of_shapes_of_a_key_is_bounded() -> None:
    known = [(f"/f{n}",) for n in range(limits.MATCH_FIELD_SETS_MAX)]
    beyond = condition("input.other == 1")
    assert index_key(beyond, known) == ((), index_key(condition(), ()).match_key)
    event = parsed_event({"other": 1})
    found = Waits([wait(beyond, field_sets=known)]).satisfied_by(event, lookup_keys(event, known))
    assert [each.id for each in found] == ["w1"]


def test_a_wait_with_a_bad_expression_is_refused_when_it_is_indexed_and_harmless_if_it_was_stored() -> None:
    bad = condition("input.a ===")
    with pytest.raises(ExpressionError):
        index_key(bad, ())
    stored = AWait(index_key(condition(), ()).match_key, Subscribe("w1", "run.task", "1", bad, 0))
    assert completed_count([wait(condition(), "good")], parsed_event()) == ["good"]
    event = parsed_event()
    assert Waits([stored]).satisfied_by(event, lookup_keys(event, ())) == []


@pytest.mark.parametrize(("since", "expected"), [(99, True), (100, False), (101, False)])
def test_a_wait_gets_only_events_after_its_position(since: int, expected: bool) -> None:
    assert bool(completed_count([wait(condition(), since=since)], parsed_event(seq=100))) is expected


def test_since_widens_how_far_back_a_wait_looks_and_never_narrows() -> None:
    event = parsed_event(seq=5_000_000)
    assert completed_count([wait(condition(since_s=5.0), since=9_000_000)], event) == ["w1"]
    assert completed_count([wait(condition(since_s=5.1), since=9_000_000)], event) == []
    assert completed_count([wait(condition(since_s=20.0), since=4_000_000)], event) == ["w1"]


def test_one_event_satisfies_many_waits_and_a_wait_is_satisfied_once() -> None:
    waits = Waits([wait(condition(), "a"), wait(condition(), "b")])
    first, second = parsed_event(seq=1), parsed_event(seq=2)
    assert [each.id for each in waits.satisfied_by(first, lookup_keys(first, ()))] == ["a", "b"]
    assert waits.satisfied_by(second, lookup_keys(second, ())) == []
    assert not waits


def test_the_task_gets_the_unchanged_payload_and_the_position_of_the_event() -> None:
    event = AnEvent(payload='{"n":1.50}', seq=7)
    message = event_matched(Subscribe("w", "run.task", "3", condition(), 0), event)
    assert (message.task_run_id, message.operation_id, message.key, message.seq) == ("run.task", "3", "c", 7)
    assert bytes(message.payload) == b'{"n":1.50}'


_values = st.sampled_from([0, 1, 1.0, -1, True, "a", "1", None, [1], {"x": 1}, 2**70])
_waits = st.lists(
    st.builds(
        condition,
        st.sampled_from(
            [
                None,
                "input.a == 1",
                "input.a == 1 && input.b == 'a'",
                "input.b == true || input.a == 1",
                "input.a.x == 1",
                "input.c > 0",
                "'a' == input.c && (input.a == -1)",
            ]
        ),
        st.sampled_from([None, "s", "t"]),
    ),
    max_size=6,
)


@settings(max_examples=500, deadline=None)
@given(_waits, st.dictionaries(st.sampled_from("abc"), _values, max_size=3), st.sampled_from([None, "s", "u"]))
def test_the_index_finds_exactly_what_looking_at_every_wait_would_find(
    conditions: list[EventCondition], payload: dict[str, Any], scope: str | None
) -> None:
    waits = [wait(each, str(n)) for n, each in enumerate(conditions)]
    event = parsed_event(payload, scope=scope)
    everything = {each.match_key for each in waits}
    by_looking_at_all = {each.id for each in Waits(waits).satisfied_by(event, sorted(everything))}
    assert set(completed_count(waits, event)) == by_looking_at_all
