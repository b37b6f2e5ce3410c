"""CEL expressions: what is true, what is refused, and the equality terms that become part of an index key."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sublet_engine import limits
from sublet_engine.expressions import (
    FILTER_VARIABLES,
    PARENT_VARIABLES,
    ExpressionError,
    Facts,
    canonical,
    compile_expression,
    equality_terms,
    value_at,
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


@pytest.mark.parametrize(
    ("text", "terms"),
    [
        ("input.order_id == 42", {("order_id",): "42"}),
        ("42 == input.order_id", {("order_id",): "42"}),
        ("input.a.b == 'x'", {("a", "b"): "'x"}),
        ('input["order-id"] == "x"', {("order-id",): "'x"}),
        ("input.a == -5", {("a",): "-5"}),
        ("input.a == 5.0", {("a",): "5"}),
        ("input.a == 0.5", {("a",): "0.5"}),
        ("input.a == true", {("a",): "true"}),
        ("input.a == 1 && input.b == 'y' && input.c > 3", {("a",): "1", ("b",): "'y"}),
        ("(input.a == 1 && (input.b == 2)) && input.c < 1", {("a",): "1", ("b",): "2"}),
        ("input.a == 1 && (input.b == 2 || input.c == 3)", {("a",): "1"}),
        ("input.s == 'a && b || c' && input.d == 1", {("s",): "'a && b || c", ("d",): "1"}),
        ("input.url == 'https://x'", {("url",): "'https://x"}),
        # What is not a necessary condition, or not certainly read as CEL reads it, gives nothing.
        ("input.a == 1 || input.b == 2", {}),
        ("input.a == 1 ? true : false", {}),
        ("input.a == 1 && input.x || input.b == 2", {}),
        ("!(input.a == 1)", {}),
        ("input.a != 1", {}),
        ("input.a == 1 == true", {}),
        ("input.a == input.b", {}),
        ("input.a == null", {}),
        ("input.a == 9007199254740993", {}),
        ("input.a == 5u", {}),
        ("input.a == 0x10", {}),
        ("input.a == r'x'", {}),
        ("input.a == b'x'", {}),
        (r"input.a == 'x\'' && input.b == 1", {}),
        ("input.a == '''x''' && input.b == 1", {}),
        ("input.a == 1 // || true", {}),
        ("input == 1", {}),
        ("input.a.size() == 1", {}),
        ("input.list[0] == 1", {}),
        ("input.list.all(input, input.a == 1)", {}),
        ("input.a + 1 == 2", {}),
    ],
)
def test_equality_terms_of_the_top_level_conjunction(text: str, terms: dict[tuple[str, ...], str]) -> None:
    assert dict(equality_terms(text)) == terms


def test_values_that_are_equal_in_cel_have_one_canonical_text_and_others_have_not() -> None:
    assert canonical(1) == canonical(1.0) == "1"
    assert canonical(-0.0) == canonical(0) == "0"
    assert len({canonical(True), canonical(1), canonical("1"), canonical("true"), canonical(1.5)}) == 5
    assert canonical([1]) is canonical({}) is canonical(None) is canonical(2**60) is canonical(float("nan")) is None


_names = st.sampled_from(["a", "b", "order_id"])
_scalars = st.one_of(
    st.booleans(),
    st.integers(-3, 3),
    st.sampled_from([0.0, 1.0, 0.5, -2.0, 1e2, 2**53, 2.0**53, 2**53 + 1, 2**63, 2**70, -(2**63)]),
    st.sampled_from(["", "a", "b", "a\0b", "1", "true", "\ufffd", "é"]),
)
_payloads = st.dictionaries(
    _names,
    st.one_of(_scalars, st.none(), st.lists(_scalars, max_size=2), st.dictionaries(_names, _scalars, max_size=2)),
    max_size=3,
)
_literals = _scalars.filter(lambda value: not isinstance(value, str) or "\0" not in value).map(
    lambda value: json.dumps(value, ensure_ascii=False)
)
_paths = st.lists(_names, min_size=1, max_size=2).flatmap(
    lambda path: st.sampled_from(["input." + ".".join(path), "input" + "".join(f"['{name}']" for name in path)])
)
_comparisons = st.builds(
    lambda left, operator, right, swap: f"{right} {operator} {left}" if swap else f"{left} {operator} {right}",
    _paths,
    st.sampled_from(["==", "==", "==", "!=", "<"]),
    _literals,
    st.booleans(),
)
_expressions = st.recursive(
    _comparisons,
    lambda inner: st.one_of(
        st.builds("{} && {}".format, inner, inner),
        st.builds("{} || {}".format, inner, inner),
        st.builds("({})".format, inner),
        st.builds("!({})".format, inner),
        st.builds("{} ? {} : {}".format, inner, inner, inner),
    ),
    max_leaves=5,
)


@settings(max_examples=1_000, deadline=None)
@given(_expressions, _payloads)
@example("input.a == 'a'", {"a": "a\0b"})
@example("input.a == 9007199254740992.0", {"a": 2**53 + 1})
def test_whenever_an_expression_is_true_the_payload_holds_all_its_terms(text: str, payload: dict[str, Any]) -> None:
    try:
        expression = compile_expression(text)
    except ExpressionError:
        return
    if expression.true(input=payload):
        for path, value in equality_terms(text).items():
            assert value_at(payload, path) == value


@settings(max_examples=300, deadline=None)
@given(_paths, _literals, _payloads)
def test_a_lone_equality_is_true_exactly_when_its_term_holds(path: str, literal: str, payload: dict[str, Any]) -> None:
    text = f"{path} == {literal}"
    terms = equality_terms(text)
    if terms:
        holds = all(value_at(payload, path) == value for path, value in terms.items())
        assert compile_expression(text).true(input=payload) is holds


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=40))
def test_any_text_is_either_compiled_or_refused(text: str) -> None:
    equality_terms(text)
    with contextlib.suppress(ExpressionError):
        compile_expression(text).true(input={})
