"""Which runs an event starts."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sublet_engine.event.intake import ParsedEvent
from sublet_engine.event.triggers import Triggers, covers
from sublet_engine.run.effects import position_at
from sublet_protocol.specs import EventFilter


@dataclass(frozen=True)
class AnEvent:
    payload: str = '{"n":1}'
    key: str = "order.paid"
    scope: str | None = None
    seq: int = 100
    id: str = "e1"
    metadata: dict[str, object] = field(default_factory=lambda: {"tenant": "x"})
    priority: int | None = 2
    seen_at: float = 5.0


@dataclass(frozen=True)
class ATrigger:
    workflow: str
    on_events: tuple[str, ...] = ("order.paid",)
    filters: tuple[EventFilter, ...] = ()


def started(*triggers: ATrigger, **event: object) -> list[str]:
    return [run.workflow for run in Triggers(triggers).runs(ParsedEvent(AnEvent(**event)))]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("pattern", "key", "expected"),
    [
        ("order.paid", "order.paid", True),
        ("order.paid", "order.paid2", False),
        ("order.*", "order.paid", True),
        ("order.*", "order.", True),
        ("order.*", "order", False),
        ("*", "", True),
        ("*.paid", "a.b.paid", True),
        ("a*b*c", "aXbXc", True),
        ("a*b*c", "abc", True),
        ("a*b*c", "acb", False),
        ("ab*ba", "aba", False),
        ("a.c", "abc", False),
        ("*a*a*a*a*a*a*a*a*a*a*a*a*b", "a" * 120, False),
    ],
)
def test_a_star_in_a_pattern_stands_for_any_characters(pattern: str, key: str, expected: bool) -> None:
    assert covers(pattern, key) is expected


@given(st.lists(st.text("ab.", max_size=3), min_size=2, max_size=4), st.lists(st.text("ab.", max_size=3), max_size=3))
def test_a_pattern_covers_every_key_made_from_it(parts: list[str], fillings: list[str]) -> None:
    fillings = [*fillings, "", "", ""][: len(parts) - 1]
    key = parts[0] + "".join(filling + part for filling, part in zip(fillings, parts[1:], strict=True))
    assert covers("*".join(parts), key)


def test_a_workflow_without_filters_gets_one_run_with_the_event_in_it() -> None:
    event = AnEvent(scope="s")
    [run] = Triggers([ATrigger("w")]).runs(ParsedEvent(event))
    assert (run.workflow, bytes(run.input), run.metadata, run.priority) == ("w", b'{"n":1}', {"tenant": "x"}, 2)
    assert run.trigger is not None
    assert (run.trigger.event_id, run.trigger.event_key) == ("e1", "order.paid")
    assert run.requested_at == 5.0


@pytest.mark.parametrize("seq", [4_999_999, 5_000_000, 5_000_001, 5_000_100])
def test_a_run_that_an_event_starts_begins_after_it(seq: int) -> None:
    [run] = Triggers([ATrigger("w")]).runs(ParsedEvent(AnEvent(seq=seq)))
    assert position_at(run.requested_at) >= seq


def test_several_patterns_of_one_workflow_give_one_run() -> None:
    assert started(ATrigger("w", ("order.*", "order.paid", "*"))) == ["w"]


def test_every_workflow_that_listens_gets_its_run() -> None:
    assert started(ATrigger("b"), ATrigger("a", ("order.*",)), ATrigger("c", ("other",))) == ["a", "b"]


@pytest.mark.parametrize(
    ("scope", "count"),
    [(None, 0), ("other", 0), ("s", 2), ("t", 1)],
)
def test_filters_give_a_run_for_each_of_the_scope_that_is_true(scope: str | None, count: int) -> None:
    filters = (
        EventFilter("input.n == payload.n", "s", {"n": 1}),
        EventFilter("input.n < 2", "s", {"n": 2}),
        EventFilter("input.n > 2", "s"),
        EventFilter("additional_metadata.tenant == 'x' && event_key == 'order.paid' && event_id == 'e1'", "t"),
    )
    assert len(started(ATrigger("w", filters=filters), scope=scope)) == count


def test_each_run_has_the_payload_of_its_filter_and_an_id_of_its_own() -> None:
    filters = tuple(EventFilter("true", "s", {"n": n}) for n in (1, 2, 2))
    triggers = Triggers([ATrigger("w", filters=filters)])
    runs = triggers.runs(ParsedEvent(AnEvent(scope="s")))
    assert sorted(run.trigger.filter_payload["n"] for run in runs if run.trigger) == [1, 2]  # type: ignore[type-var]
    assert len({run.run_id for run in runs}) == 2


def test_the_same_event_gives_the_same_run_ids_again() -> None:
    triggers = Triggers([ATrigger("w"), ATrigger("v", filters=(EventFilter("true", "s"),))])
    first, again = (triggers.runs(ParsedEvent(AnEvent(scope="s"))) for _ in range(2))
    assert [run.run_id for run in first] == [run.run_id for run in again]
    other = triggers.runs(ParsedEvent(AnEvent(scope="s", id="e2")))
    assert not {run.run_id for run in first} & {run.run_id for run in other}


@pytest.mark.parametrize("expression", ["", "input.missing == 1", "input.n", "input.n ===", "output.n == 1"])
def test_a_filter_that_is_empty_or_fails_lets_nothing_through_and_is_counted(expression: str) -> None:
    triggers = Triggers([ATrigger("bad", filters=(EventFilter(expression, "s"),)), ATrigger("good")])
    assert [run.workflow for run in triggers.runs(ParsedEvent(AnEvent(scope="s")))] == ["good"]
    assert triggers.failures == 1
