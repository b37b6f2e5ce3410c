"""Equality terms: necessary always, and sufficient where they are the whole expression."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sublet_protocol.cel.equality import canonical, equality_terms, value_at
from sublet_protocol.cel.expressions import ExpressionError, compile_expression


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
        ('input["\ufffd"] == 1', {}),
    ],
)
def test_equality_terms_of_the_top_level_conjunction(text: str, terms: dict[tuple[str, ...], str]) -> None:
    assert dict(equality_terms(text).values) == terms


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

_conjunctions = st.lists(_comparisons, min_size=1, max_size=3).map(" && ".join)


@settings(max_examples=500, deadline=None)
@given(_expressions, _payloads)
@example("input.a == 'a'", {"a": "a\0b"})
@example("input.a == 9007199254740992.0", {"a": 2**53 + 1})
def test_whenever_an_expression_is_true_the_payload_holds_all_its_terms(text: str, payload: dict[str, Any]) -> None:
    try:
        expression = compile_expression(text)
    except ExpressionError:
        return
    if expression.true(input=payload):
        for path, value in equality_terms(text).values.items():
            assert value_at(payload, path) == value


@settings(max_examples=500, deadline=None)
@given(_conjunctions, _payloads)
@example("input.a == 'a'", {"a": "a\0b"})
def test_an_expression_that_is_nothing_but_terms_is_true_exactly_when_they_hold(
    text: str, payload: dict[str, Any]
) -> None:
    terms = equality_terms(text)
    if terms.whole:
        assert compile_expression(text).true(input=payload) is terms.hold(payload)


@pytest.mark.parametrize(
    ("text", "whole"),
    [
        ("input.a == 1", True),
        ("(input.a == 1) && ('x' == input.b.c)", True),
        ("input.a == 1 && input.a == 1.0", True),
        ("input.a == 1 && input.a == 2", False),
        ("input.a == 1 && input.b > 2", False),
        ("input.a == 1 || input.b == 2", False),
        ("true", False),
        ("", False),
    ],
)
def test_it_is_known_whether_an_expression_is_nothing_but_terms(text: str, whole: bool) -> None:
    assert equality_terms(text).whole is whole


@given(st.text("input.a=&|()'\"[]1 ?!\\/", max_size=40))
def test_any_text_can_be_read(text: str) -> None:
    equality_terms(text)
