"""CEL expressions: what is true, what is refused."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sublet_protocol import limits
from sublet_protocol.cel.expressions import (
    FILTER_VARIABLES,
    PARENT_VARIABLES,
    ExpressionError,
    Facts,
    compile_expression,
)


@pytest.mark.parametrize(
    ("text", "payload", "expected"),
    [
        ("input.amount > 100", {"amount": 150}, True),
        ("input.amount > 100", {"amount": 50}, False),
        ("input.amount == 1", {"amount": 1.0}, True),
        ("input.ok", {"ok": True}, True),
        ("input.user.name == 'Ada'", {"user": {"name": "Ada"}}, True),
        ('input["order-id"] == 4', {"order-id": 4}, True),
        ("input.tags.exists(t, t == 'b')", {"tags": ["a", "b"]}, True),
        ("input.other == 1", {"other": 1, "huge": 2**70}, True),
        ("input.huge > 5", {"huge": 2**70}, True),
        ("input.huge > 5", {"huge": 10**400}, True),
        ("input.name == 'a'", {"name": "a\0b"}, False),
        ("input.name != 'a'", {"name": "\ud800"}, True),
    ],
)
def test_an_expression_is_true_or_false_for_a_payload(text: str, payload: dict[str, Any], expected: bool) -> None:
    assert compile_expression(text).true(input=payload) is expected


@pytest.mark.parametrize(
    ("text", "payload"),
    [
        ("input.missing == 1", {}),
        ("input.amount > 100", {"amount": "many"}),
        ("input.amount", {"amount": 5}),
        ("input.name", {"name": "true"}),
        ("input.a.exists(x, x == -1)", {"a": list(range(200_000))}),
    ],
)
def test_an_error_or_a_value_that_is_no_boolean_is_a_failure_and_not_true(text: str, payload: dict[str, Any]) -> None:
    expression = compile_expression(text)
    assert expression.verdict(Facts(input=payload)) is None
    assert expression.true(input=payload) is False


def test_deeply_nested_data_does_not_crash() -> None:
    payload: dict[str, Any] = {}
    for _ in range(50_000):
        payload = {"a": payload}
    assert compile_expression("input.a == 1").true(input=payload) is False


def test_a_variable_without_value_is_a_failure() -> None:
    assert compile_expression("input.a == 1").true() is False


def test_filters_see_the_event_and_their_own_payload() -> None:
    text = (
        "input.n >= payload.least && additional_metadata.tenant == 'x' && event_key == 'order.paid' && event_id == 'e1'"
    )
    facts = {
        "input": {"n": 5},
        "payload": {"least": 5},
        "additional_metadata": {"tenant": "x"},
        "event_key": "order.paid",
        "event_id": "e1",
    }
    expression = compile_expression(text, FILTER_VARIABLES)
    assert expression.true(**facts)
    assert not expression.true(**{**facts, "event_id": "e2"})


def test_parent_conditions_see_the_output_alone() -> None:
    assert compile_expression("output.score > 0.5", PARENT_VARIABLES).true(output={"score": 0.9})
    with pytest.raises(ExpressionError, match=r"undeclared reference to 'input\.score'"):
        compile_expression("input.score > 0.5", PARENT_VARIABLES)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must not be empty"),
        ("  ", "must not be empty"),
        ("input.a ==", "line 1, column 11"),
        ("other.a == 1", "undeclared reference to 'other.a'"),
        ("'text'", "gives STRING, not true or false"),
        ("input.a == '\0'", "control characters"),
        ("input.a == '\ud800'", "control characters"),
        ("(" * 500 + "true" + ")" * 500, "recursion limit"),
        ("input.a == '" + "x" * limits.EXPRESSION_MAX_CHARS + "'", "characters; at most 2,048"),
    ],
)
def test_a_bad_expression_is_refused_with_its_text_and_the_reason(text: str, message: str) -> None:
    with pytest.raises(ExpressionError, match=message):
        compile_expression(text)


def test_equal_texts_are_compiled_once() -> None:
    assert compile_expression("input.a == 1") is compile_expression("input.a == 1")


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=40))
def test_any_text_is_either_compiled_or_refused(text: str) -> None:
    with contextlib.suppress(ExpressionError):
        compile_expression(text).true(input={})
