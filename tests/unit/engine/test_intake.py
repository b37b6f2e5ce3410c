"""What is accepted as an event, under which id, and in which order."""

from __future__ import annotations

import datetime
import itertools
from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sublet_engine.event.intake import Arrival, InvalidEvent, Sequence, parse_event
from sublet_protocol import limits

UUID = "0b6a9a1e-57e5-4b5e-9d5c-3f7f8e0a4c11"


def parse(
    body: bytes = b"{}",
    key: str = "order.paid",
    message_id: str | None = None,
    headers: Mapping[str, object] | None = None,
) -> Arrival:
    return parse_event(body, key, message_id, headers or {}, seen_at=5.0, new_id=lambda: "minted")


def test_body_key_and_headers_make_an_event() -> None:
    headers = {"scope": "s", "priority": 3, "tenant": "x", "tags": ["a", {"b": 1.5}], "x-death": object(), "raw": b"t"}
    event = parse(b'{"n": 1.50}', message_id=UUID, headers=headers)
    assert event == Arrival(
        id=UUID,
        key="order.paid",
        payload='{"n": 1.50}',
        scope="s",
        metadata={"tenant": "x", "tags": ["a", {"b": 1.5}], "raw": "t"},
        priority=3,
        seen_at=5.0,
    )


def test_the_message_id_is_the_id_with_the_key_unless_it_is_unique_by_itself() -> None:
    assert parse(message_id=None).id == "minted"
    assert parse(message_id="").id == "minted"
    assert parse(message_id=UUID).id == UUID
    assert parse(message_id=UUID.replace("-", "")).id == UUID.replace("-", "")
    assert parse(message_id="42").id == "order.paid:42"


def test_a_priority_may_be_text_because_command_line_tools_know_nothing_else() -> None:
    assert parse(headers={"priority": "2"}).priority == 2
    assert parse(headers={"priority": b"2"}).priority == 2


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b'{"a": NaN}', "not JSON"),
        (b'{"a": 1e999}', "not JSON"),
        (b'{"a": "\xff"}', "not JSON"),
        (b'{"a": "\\ud800"}', "not JSON"),
        (b"[1]", "must be a JSON object, not an array"),
        (b"null", "must be a JSON object, not null"),
        (b"5", "must be a JSON object, not a number"),
        (b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
        (b'{"a": "' + b"x" * limits.PAYLOAD_MAX_BYTES + b'"}', "at most 1,048,576"),
    ],
)
def test_a_body_that_is_no_payload_is_refused_with_the_reason(body: bytes, reason: str) -> None:
    with pytest.raises(InvalidEvent, match=reason):
        parse(body)


@pytest.mark.parametrize("key", ["", "k" * (limits.NAME_MAX_CHARS + 1)])
def test_a_key_that_is_empty_or_too_long_is_refused(key: str) -> None:
    with pytest.raises(InvalidEvent, match="1 to 128 characters"):
        parse(key=key)


@pytest.mark.parametrize(
    "headers",
    [
        {"scope": 5},
        {"scope": "s" * 200},
        {"priority": 0},
        {"priority": 4},
        {"priority": True},
        {"priority": 1.5},
        {"priority": "high"},
        {"priority": [1]},
        {"when": datetime.datetime(2024, 1, 1)},
        {"bytes": b"\xff"},
        {"huge": 2**70},
        {"nan": float("nan")},
        {"deep": {"a": [datetime.date(2024, 1, 1)]}},
        {"large": "x" * limits.METADATA_MAX_BYTES},
    ],
)
def test_headers_that_break_a_rule_are_refused_and_named(headers: dict[str, object]) -> None:
    with pytest.raises(InvalidEvent, match="header"):
        parse(headers=headers)


def test_metadata_nested_beyond_what_databases_take_is_refused() -> None:
    deep: object = 1
    for _ in range(50):
        deep = [deep]
    with pytest.raises(InvalidEvent, match="deeper than"):
        parse(headers={"deep": deep})


@given(st.binary(max_size=30))
def test_any_body_is_either_an_event_or_refused(body: bytes) -> None:
    try:
        parse(body)
    except InvalidEvent as refusal:
        assert str(refusal).startswith("the ")  # noqa: PT017


@given(st.lists(st.floats(0, 10), min_size=1))
def test_positions_increase_even_if_the_clock_does_not(times: list[float]) -> None:
    sequence = Sequence()
    sequence.advance_past(3_000_000)
    places = [sequence.next(now) for now in times]
    assert places[0] > 3_000_000
    assert all(earlier < later for earlier, later in itertools.pairwise(places))
    assert places[-1] >= int(max(times) * 1_000_000)
