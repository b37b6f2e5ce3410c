"""What an expression may cost is known before it is evaluated."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sublet_protocol import limits
from sublet_protocol.cel.cost import extent_of, read_cost, regex_states
from sublet_protocol.cel.expressions import ExpressionError, Facts, compile_expression

NUMBERS = {"a": list(range(1_000))}
LARGE_ITEMS = [{"n": n, "text": "x" * 300} for n in range(2_000)]
LONG_TEXT = {"s": "a" * 900_000, "a": list(range(5_000))}


def work(text: str, payload: object) -> int:
    """Of an expression that is valid, and of this payload."""
    compile_expression(text)
    return read_cost(text).work(extent_of([payload]))


def verdict(text: str, payload: object) -> bool | None:
    return compile_expression(text).verdict(Facts(input=payload))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("input.a.all(x, input.a.all(y, input.a.all(z, x + y + z > 0)))", "loops in loops, 3 deep"),
        ("input.a.map(x, input.a.filter(y, input.a.exists(z, z == x)).size()).size() > 0", "loops in loops"),
        ("[1].map(x, 1 + 1 + 1 + 1 + 1 + 1 + 1 + 1 + 1 + 1)[0] == 10", "adds up or lists 9 values"),
        ("[input.s].map(x, [x, x, x, x, x]).map(x, [x, x, x, x, x, x]) == []", "adds up or lists 9 values"),
        ("input.s.matches('((a{0,1000}){0,1000}){0,1000}')", "1,000,000,000 characters"),
        ("input.s.matches('(a{0,100}){0,10}b')", "1,00"),
        ('matches(input.s, r"[ab]{1001}")', "1,001 characters"),
        ("input.a.exists(x, input.s.matches(x))", "needs its pattern as a literal text"),
        ("input.s.matches('a' + input.s)", "needs its pattern as a literal text"),
        (r"input.s.matches('(a|.)\x7b990\x7d(b|.)\u007b990}')", "5,940 characters"),
        (r'input.s.matches(""" [ab]\1731000\175""")', "1,001 characters"),
        ("input . s /* a */ == ''", "not valid CEL"),
    ],
)
def test_what_cannot_be_bounded_is_refused_when_it_is_made(text: str, reason: str) -> None:
    with pytest.raises(ExpressionError, match=reason):
        compile_expression(text)


@pytest.mark.parametrize(
    ("text", "payload"),
    [
        ("input.id.matches('^[0-9a-f]{8}(-[0-9a-f]{4}){3}$')", {"id": "00000000-0000-0000-0000"}),
        ("input.orders.exists(o, o.items.exists(i, i.sku == 'x'))", {"orders": [{"items": [{"sku": "x"}]}]}),
        ("input.items.exists(i, i.price + i.tax + i.fee > 100)", {"items": [{"price": 90, "tax": 9, "fee": 2}] * 900}),
        ("input.items.filter(i, i > 500).size() == 499", {"items": NUMBERS["a"]}),
        ("input.items.map(i, i * 2).exists(i, i == 1998)", {"items": NUMBERS["a"]}),
        ("input.kind in ['a', 'b', 'c', 'd', 'e', 'f', 'g', 'h', 'i', 'j', 'k']", {"kind": "k"}),
        ("input.items.all(i, i in [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11])", {"items": list(range(12))}),
        ("input.text.contains('needle') && input.text.size() > 3", {"text": "x" * 900_000 + "needle"}),
        (" || ".join(f"input.kind == 'k{n}'" for n in range(80)), {"kind": "k79", "blob": "x" * 900_000}),
        ("input.items.exists(i, i.sku == input.wanted)", {"items": [{"sku": n} for n in range(500)], "wanted": 499}),
        ("input.items.exists(i, i.n == input.of.wanted)", {"of": {"wanted": 1_999}, "items": LARGE_ITEMS}),
        ("input.items.all(i, (input.wanted != i.text) || i.n == 0)", {"wanted": "x", "items": LARGE_ITEMS}),
        ("input.items.exists(i, type(i.n) == int && i.n == 2)", {"items": LARGE_ITEMS}),
        ("input.text.contains(input.name)", {"text": "so says Ada", "name": "Ada", "items": LARGE_ITEMS}),
    ],
)  # fmt: skip
def test_what_people_ask_of_ordinary_events_is_answered(text: str, payload: object) -> None:
    assert verdict(text, payload) is True


@pytest.mark.parametrize(
    "text",
    [
        "input.a.map(x, input.a).size() > 0",
        "input.a.map(x, input.s + input.s).size() > 0",
        "input.a.exists(x, input.s.contains('b'))",
        "input.a.exists(x, input.s == 'b')",
        "input.a.filter(x, true).filter(x, true).size() == 0",
        "input.a.exists(x, x in input.a)",
        "input.s.contains(input.s)",
        "input.s.contains(input.a.map(x, 't')[0] + input.s)",
        "input.a.exists(x, x == input.s.size())",
        "input.a.exists(x, x > 1 && input.s == input.s)",
        "input.a.exists(x, x == input.a[x] || x == input.s + 'b')",
        "[{'a': input.a, 's': input.s}].exists(int, int.a.exists(x, int.s == int.s))",
        "input.s.matches('[ab]*a[ab]{200}[cd]')",
        "[[input.s].map(x, x + x)[0]].map(x, x + x)[0].map(x, x + x + x)[0] == ''",
    ],
)
def test_what_would_cost_too_much_for_this_payload_is_not_evaluated(text: str) -> None:
    assert work(text, LONG_TEXT) > limits.EXPRESSION_WORK_MAX_BYTES
    assert verdict(text, LONG_TEXT) is None


def test_more_values_than_are_looked_at_make_no_expression_true() -> None:
    assert verdict("input.n == 1 || false", {"n": 1, "a": [0] * (limits.EXPRESSION_VALUES_MAX - 10)}) is True
    assert verdict("input.n == 1 || false", {"n": 1, "a": [0] * limits.EXPRESSION_VALUES_MAX}) is None


def test_counting_stops_soon_after_there_are_too_many_values() -> None:
    assert extent_of([[[]] * 10_000_000]).values == limits.EXPRESSION_VALUES_MAX + 1


def test_a_loop_costs_its_turns_only_if_it_looks_beyond_its_element() -> None:
    own, others = work("input.a.exists(x, x == -1)", NUMBERS), work("input.a.exists(x, input.b == -1)", NUMBERS)
    assert own * len(NUMBERS["a"]) <= others


def test_an_expression_without_loops_patterns_and_sums_costs_no_more_than_its_length() -> None:
    assert work("input.a == input.b && !has(input.c)", LONG_TEXT) == 0


@pytest.mark.parametrize(
    ("pattern", "states"),
    [
        ("abc", 3),
        ("a{3}", 3),
        ("a{2,}", 2),
        ("(ab){10}c", 21),
        ("((a{10}){10}){10}", 1_000),
        (r"\d{4}-\pL{2}", 7),
        (r"[^\]a-z]{5}", 5),
        (r"\{3}", 3),
        ("a{0}", 1),
        ("{3}", 0),
    ],
)
def test_the_states_of_a_pattern_are_those_of_its_repetitions_written_out(pattern: str, states: int) -> None:
    assert regex_states(pattern) == states


@given(st.text(alphabet="ab(){}[]0123456789,\\?*+.^$|-:", max_size=60))
def test_any_pattern_can_be_counted(pattern: str) -> None:
    assert regex_states(pattern) >= 0


@given(st.text(max_size=80) | st.text(alphabet="input.as(),[]{}'\"\\+=!x&|rb`/*\n", max_size=80))
def test_any_text_is_an_expression_or_is_refused(text: str) -> None:
    try:
        compile_expression(text)
    except ExpressionError:
        return


def test_texts_and_comments_hide_nothing_and_add_nothing() -> None:
    quoted = read_cost("""input.s == '''x + y.map(a, 'b')''' // + input.a.map(x, x)""")
    assert (quoted.loops, quoted.copies) == (0, 0)
    after = read_cost('input.s == r"\\" || input.a.map(x, x + x).size() > 1')
    assert (after.loops, after.copies, after.collects) == (1, 1, True)
