"""What an expression may cost: told from its text, and from the size of what it is asked about.

CEL itself ends, but not soon: it copies a list for each element that ``map`` adds to it, doubles texts with ``+``, and
gives a regular expression as many states as its repetitions ask for. `read_cost` refuses what cannot be bounded; for
the rest, `Cost.work` bounds the bytes that are looked at or copied before anything is evaluated.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from sublet_engine import limits

_TOKEN = re.compile(
    r"""
    (?P<space> \s+ | //[^\n]* )
  | (?P<string> [bB]?[rR][bB]? (?: \"{3} .*? \"{3} | '{3} .*? '{3} | "[^"\n]*" | '[^'\n]*' )
              | [bB]? (?: \"{3} (?: \\. | [^\\] )*? \"{3} | '{3} (?: \\. | [^\\] )*? '{3}
                        | " (?: \\. | [^"\\] )* " | ' (?: \\. | [^'\\] )* ' ) )
  | (?P<name> [A-Za-z_]\w* | `[^`]*` )
  | (?P<number> (?: \d | \.\d ) (?: \w | \.\d | [eE][+-] )* )
  | (?P<operator> && | \|\| | == | != | <= | >= | . )
    """,
    re.VERBOSE | re.DOTALL | re.ASCII,
)
_LOOPS = frozenset(("all", "exists", "exists_one", "map", "filter"))
_COLLECTING = frozenset(("map", "filter"))
_WORKING = frozenset(("==", "!=", "<", "<=", ">", ">=", "in", "+", "-", "*", "/", "%"))
_LITERALS = frozenset(("true", "false", "null", "in"))

_ENTRY_BYTES = 64
"""Of an element of a list that CEL copies."""
_STATE_BYTES = 16
"""A byte seen by one state of a regular expression costs as much as copying this many."""
_SEARCH_BYTES = 64
"""Bytes that a search compares in the time of copying one."""


class Extent(NamedTuple):
    """How much there is to look at."""

    bytes: int
    values: int
    longest: int
    """Elements of the largest list or object."""


def extent_of(values: Iterable[object]) -> Extent:
    """Of JSON data, all together. It stops counting where there are more values than expressions are asked about."""
    size = count = longest = 0
    waiting = list(values)
    while waiting and count <= limits.EXPRESSION_VALUES_MAX:
        value = waiting.pop()
        count += 1
        size += 16
        if isinstance(value, str):
            size += len(value)
        elif isinstance(value, Mapping):
            longest = max(longest, len(value))
            size += sum(map(len, value))
            waiting += value.values()
        elif isinstance(value, list | tuple):
            longest = max(longest, len(value))
            waiting += value
    return Extent(size, count, longest)


class TooCostly(ValueError):
    """The expression could take more than there is. The text says which part, and what to do."""


@dataclass
class Cost:
    """What the text of an expression tells."""

    operations: int = 0
    copies: int = 0
    """Additions, and elements of lists made from values: each may double what there is."""
    states: int = 0
    """Of its regular expressions."""
    searches: int = 0
    """For texts that are not in the expression."""
    elements: int = 0
    """Of the lists in its text."""
    loops: int = 0
    depth: int = 0
    """Of loops in loops."""
    repeats: bool = False
    """A loop looks, for each element, at something else than that element."""
    collects: bool = False
    """A loop makes a list."""

    def work(self, extent: Extent) -> int:
        """At most so many bytes are looked at or copied."""
        if not (self.loops or self.copies or self.states or self.searches):
            return 0  # bounded by the length of the text
        turns = max(extent.longest, self.elements)
        steps = self.operations + self.states * _STATE_BYTES + self.searches * extent.bytes // _SEARCH_BYTES
        work = extent.bytes * (steps + 1) * (turns if self.repeats else 1)
        if self.collects:
            total_turns = min(extent.longest**self.depth, limits.EXPRESSION_VALUES_MAX)
            work += total_turns * extent.longest * _ENTRY_BYTES
        return work << self.copies if self.loops else work * (self.copies + 1)


@dataclass
class _Bracket:
    function: str = ""
    variable: str | None = None
    """Of a loop."""
    literal: bool = False
    """A list or an object, not an index."""
    elements: int = 0
    holds_names: bool = False
    tokens: list[tuple[str, str]] = field(default_factory=list)


def read_cost(text: str) -> Cost:
    """Of an expression that is valid CEL.

    Raises:
        TooCostly: it cannot be bounded.
    """
    tokens = [
        (found.lastgroup or "", found[0]) for found in _TOKEN.finditer(text) if found.lastgroup not in ("space", None)
    ]
    cost = Cost()
    brackets = [_Bracket()]
    for place, token in enumerate(tokens):
        before = tokens[place - 1] if place else ("", "")
        after = tokens[place + 1] if place + 1 < len(tokens) else ("", "")
        if token[0] == "operator" and token[1] in "([{":
            brackets.append(_opened(token[1], tokens, place, cost))
            _check_loops(brackets, cost)
        elif token[0] == "operator" and token[1] in ")]}" and len(brackets) > 1:
            _close(brackets.pop(), brackets, cost)
        else:
            _count(token, before, after, brackets, cost)
    if cost.copies > limits.EXPRESSION_COPIES_MAX:
        raise TooCostly(
            f"it adds up or lists {cost.copies} values; at most {limits.EXPRESSION_COPIES_MAX} are allowed: "
            "compute the value before you publish it"
        )
    return cost


def _opened(bracket: str, tokens: list[tuple[str, str]], place: int, cost: Cost) -> _Bracket:
    before = tokens[place - 1] if place else ("", "")
    if bracket == "(" and before[0] == "name":
        cost.operations += 1
        is_method = place > 1 and tokens[place - 2] == ("operator", ".")
        if is_method and before[1] in _LOOPS:
            cost.loops += 1
            cost.collects = cost.collects or before[1] in _COLLECTING
            return _Bracket(before[1], variable=tokens[place + 1][1])
        return _Bracket(before[1])
    follows_value = before[0] in ("name", "string") or before[1] in (")", "]", "}")
    return _Bracket(literal=bracket != "(" and not (bracket == "[" and follows_value and before[1] != "in"))


def _check_loops(brackets: list[_Bracket], cost: Cost) -> None:
    cost.depth = max(cost.depth, sum(bracket.variable is not None for bracket in brackets))
    if cost.depth > limits.EXPRESSION_LOOP_DEPTH_MAX:
        raise TooCostly(
            f"it has loops in loops, {cost.depth} deep; at most {limits.EXPRESSION_LOOP_DEPTH_MAX} are allowed: "
            "publish what you look for nearer to the top of the payload"
        )


def _count(
    token: tuple[str, str], before: tuple[str, str], after: tuple[str, str], brackets: list[_Bracket], cost: Cost
) -> None:
    brackets[-1].tokens.append(token)
    kind, text = token
    if text in _WORKING and kind in ("operator", "name"):
        cost.operations += 1
        cost.copies += text == "+" and before[1] not in ("", "(", "[", "{", ",", ":", "?")
    if text == "," and kind == "operator":
        brackets[-1].elements += 1
        cost.elements += 1
    if kind == "name" and text not in _LITERALS and before != ("operator", "."):
        for bracket in brackets:
            bracket.holds_names = True
        inner = next((bracket for bracket in reversed(brackets) if bracket.variable is not None), None)
        if inner is not None and after != ("operator", "(") and text != inner.variable:
            cost.repeats = True


def _close(bracket: _Bracket, outer: list[_Bracket], cost: Cost) -> None:
    outer[-1].tokens.append(("value", ""))
    if bracket.literal and bracket.holds_names:
        cost.copies += bracket.elements
    argument = bracket.tokens[-1:]
    literal = argument[0][1] if argument and argument[0][0] == "string" else None
    is_whole = len(bracket.tokens) == 1 or bracket.tokens[-2:-1] == [("operator", ",")]
    if bracket.function == "matches":
        if literal is None or not is_whole:
            raise TooCostly("matches() wants its pattern as a text in the expression, so that it can be looked at")
        cost.states += _checked_states(literal.lstrip("bBrR").strip("\"'"))
    elif bracket.function == "contains" and (literal is None or not is_whole):
        cost.searches += 1


def _checked_states(pattern: str) -> int:
    states = regex_states(pattern)
    if states > limits.REGEX_STATES_MAX:
        raise TooCostly(
            f"the pattern {pattern!r} stands for {states:,} characters with all its repetitions; "
            f"at most {limits.REGEX_STATES_MAX:,} are allowed: repeat less"
        )
    return states


_REGEX_PART = re.compile(r"\\[pP](?:\{[^}]*\}|\w) | \\. | \[ \]? (?: \\. | \[:\w+:\] | [^\]\\] )* \] | . ", re.X | re.S)
_REPETITION = re.compile(r"\{(\d+)(?:,(\d*))?\}")


def regex_states(pattern: str) -> int:
    """The characters that a pattern stands for when its counted repetitions are written out."""
    groups = [0]
    last = 0
    place = 0
    while place < len(pattern):
        repeated = _REPETITION.match(pattern, place)
        if repeated is not None:
            times = max(int(number[:9]) for number in repeated.groups("0") if number) if repeated[1] else 1
            groups[-1] += last * (max(times, 1) - 1)
            last *= max(times, 1)
            place = repeated.end()
            continue
        part = _REGEX_PART.match(pattern, place)
        assert part is not None, "any character is a part"
        place = part.end()
        if part[0] == "(":
            groups.append(0)
        elif part[0] == ")" and len(groups) > 1:
            last = groups.pop()
            groups[-1] += last
        else:
            last = 1
            groups[-1] += 1
    return sum(groups)
