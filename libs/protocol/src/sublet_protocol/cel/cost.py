"""The cost of an expression, estimated from its text and from the size of the data before it is evaluated.

Every CEL evaluation terminates, but it can take very long: CEL copies a list for each element that ``map`` adds,
doubles texts with ``+``, and gives a regular expression a state for each written-out repetition. `read_cost` rejects
expressions whose cost has no bound. For all others `Cost.work` is an upper bound of the bytes that are read or copied.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from sublet_protocol import limits

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
_TYPES = frozenset(("bool", "bytes", "double", "int", "list", "map", "null_type", "string", "type", "uint"))
_BEFORE_OPERAND = frozenset(("(", "[", ",", "&&", "||", "?", ":"))
_AFTER_OPERAND = frozenset((")", "]", ",", "&&", "||", "?", ":"))
_ESCAPE = re.compile(
    r"\\ (?: [xX]([0-9a-fA-F]{2}) | u([0-9a-fA-F]{4}) | U([0-9a-fA-F]{8}) | ([0-3][0-7]{2}) | (.) )", re.X | re.S
)

_ENTRY_BYTES = 64
"""Bytes that CEL copies for one element of a list."""
_STATE_BYTES = 16
"""One state of a regular expression that reads one byte takes as long as copying this many bytes."""
_SEARCH_BYTES = 64
"""Bytes that a search compares in the time that copying one byte takes."""


class Extent(NamedTuple):
    """The size of JSON data."""

    bytes: int
    values: int
    longest: int
    """Elements of the largest list or object."""
    widest: int
    """Characters of the longest text."""


def extent_of(values: Iterable[object]) -> Extent:
    """The total size of these JSON values. Counting stops after `limits.EXPRESSION_VALUES_MAX` values."""
    size = count = longest = widest = 0
    waiting = list(values)
    while waiting and count <= limits.EXPRESSION_VALUES_MAX:
        value = waiting.pop()
        count += 1
        size += 16
        if isinstance(value, str):
            size += len(value)
            widest = max(widest, len(value))
        elif isinstance(value, Mapping):
            longest = max(longest, len(value))
            size += sum(map(len, value))
            widest = max(widest, max(map(len, value), default=0))
            waiting += value.values()
        elif isinstance(value, list | tuple):
            longest = max(longest, len(value))
            waiting += value
    return Extent(size, count, longest, widest)


class TooCostly(ValueError):
    """The cost of the expression has no acceptable bound. The text names the part and the cure."""


@dataclass
class Cost:
    """The properties of an expression's text that decide its cost."""

    operations: int = 0
    copies: int = 0
    """Additions, and elements of lists that contain values: each may double the size of the data."""
    states: int = 0
    """States of its regular expressions."""
    searches: int = 0
    """Calls of ``contains`` whose argument is not a literal."""
    elements: int = 0
    """Elements of the lists in its text."""
    loops: int = 0
    depth: int = 0
    """Depth of nested loops."""
    repeats: bool = False
    """For each element, a loop also reads data other than that element."""
    collects: bool = False
    """A loop creates a list."""

    def work(self, extent: Extent) -> int:
        """An upper bound of the bytes that are read or copied."""
        if not (self.loops or self.copies or self.states or self.searches):
            return 0  # bounded by the length of the text
        turns = max(extent.longest, self.elements)
        searching = self.searches * (extent.widest << self.copies) // _SEARCH_BYTES
        steps = self.operations + self.states * _STATE_BYTES + searching
        work = extent.bytes * (steps + 1) * (turns if self.repeats else 1)
        if self.collects:
            total_turns = min(extent.longest**self.depth, limits.EXPRESSION_VALUES_MAX)
            work += total_turns * extent.longest * _ENTRY_BYTES
        return work << self.copies if self.loops else work * (self.copies + 1)


@dataclass
class _Bracket:
    function: str = ""
    variable: str | None = None
    """The variable of a loop."""
    literal: bool = False
    """The bracket is a list or an object, not an index."""
    elements: int = 0
    holds_names: bool = False
    tokens: list[tuple[str, str]] = field(default_factory=list)


def read_cost(text: str) -> Cost:
    """The cost of an expression that is valid CEL.

    Raises:
        TooCostly: the cost has no acceptable bound.
    """
    tokens = [
        (found.lastgroup or "", found[0]) for found in _TOKEN.finditer(text) if found.lastgroup not in ("space", None)
    ]
    cost = Cost()
    compared = _compared_paths(tokens)
    brackets = [_Bracket()]
    for index, token in enumerate(tokens):
        before = tokens[index - 1] if index else ("", "")
        if token[0] == "operator" and token[1] in "([{":
            brackets.append(_opened(token[1], tokens, index, cost))
            _check_loops(brackets, cost)
        elif token[0] == "operator" and token[1] in ")]}" and len(brackets) > 1:
            _close(brackets.pop(), brackets, cost)
        else:
            _count(token, before, brackets, cost)
            if token[0] == "name" and before != ("operator", "."):
                _count_name(token[1], compared.get(index), _text_at(tokens, index + 1), brackets, cost)
    if cost.copies > limits.EXPRESSION_COPIES_MAX:
        raise TooCostly(
            f"it adds up or lists {cost.copies} values; at most {limits.EXPRESSION_COPIES_MAX} are allowed: "
            "compute the value before you publish it"
        )
    return cost


def _opened(bracket: str, tokens: list[tuple[str, str]], index: int, cost: Cost) -> _Bracket:
    before = tokens[index - 1] if index else ("", "")
    if bracket == "(" and before[0] == "name":
        cost.operations += 1
        is_method = index > 1 and tokens[index - 2] == ("operator", ".")
        if is_method and before[1] in _LOOPS:
            cost.loops += 1
            cost.collects = cost.collects or before[1] in _COLLECTING
            return _Bracket(before[1], variable=tokens[index + 1][1])
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


def _count(token: tuple[str, str], before: tuple[str, str], brackets: list[_Bracket], cost: Cost) -> None:
    brackets[-1].tokens.append(token)
    kind, text = token
    if text in _WORKING and kind in ("operator", "name"):
        cost.operations += 1
        cost.copies += text == "+" and before[1] not in ("", "(", "[", "{", ",", ":", "?")
    if text == "," and kind == "operator":
        brackets[-1].elements += 1
        cost.elements += 1


def _count_name(name: str, compared_with: str | None, after: str, brackets: list[_Bracket], cost: Cost) -> None:
    """Count the name of a variable, a function, a type or a literal."""
    variables = [bracket.variable for bracket in brackets if bracket.variable is not None]
    if name in _LITERALS or (name in _TYPES and name not in variables):
        return
    for bracket in brackets:
        bracket.holds_names = True
    # A comparison with the element, or a part of it, costs no more than reading the element.
    if variables and after != "(" and variables[-1] not in (name, compared_with):
        cost.repeats = True


def _compared_paths(tokens: list[tuple[str, str]]) -> dict[int, str]:
    """The operands of equality tests: for the index of a name token, the name that it is compared with. Both may be
    followed by fields."""
    compared: dict[int, str] = {}
    for index, token in enumerate(tokens):
        if token in (("operator", "=="), ("operator", "!=")):
            left, right, end = index - 1, index + 1, index + 1
            while _text_at(tokens, left - 1) == ".":
                left -= 2
            while _text_at(tokens, end + 1) == ".":
                end += 2
            if _text_at(tokens, left - 1) in _BEFORE_OPERAND and _text_at(tokens, end + 1) in _AFTER_OPERAND:
                compared[left], compared[right] = tokens[right][1], tokens[left][1]
    return compared


def _text_at(tokens: list[tuple[str, str]], index: int) -> str:
    return tokens[index][1] if 0 <= index < len(tokens) else ""


def _close(bracket: _Bracket, outer: list[_Bracket], cost: Cost) -> None:
    outer[-1].tokens.append(("value", ""))
    if bracket.literal and bracket.holds_names:
        cost.copies += bracket.elements
    argument = bracket.tokens[-1:]
    literal = argument[0][1] if argument and argument[0][0] == "string" else None
    is_whole = len(bracket.tokens) == 1 or bracket.tokens[-2:-1] == [("operator", ",")]
    if bracket.function == "matches":
        if literal is None or not is_whole:
            raise TooCostly("matches() needs its pattern as a literal text, so that the pattern can be checked")
        cost.states += _checked_states(_content(literal))
    elif bracket.function == "contains" and (literal is None or not is_whole):
        cost.searches += 1


def _content(literal: str) -> str:
    """The value of a string literal."""
    quoted = literal.lstrip("bBrR")
    is_raw = "r" in literal[: len(literal) - len(quoted)].lower()
    quotes = 3 if quoted[:3] in ('"""', "'''") else 1
    content = quoted[quotes:-quotes]
    return content if is_raw else _ESCAPE.sub(_unescaped, content)


def _unescaped(escape: re.Match[str]) -> str:
    *hexadecimal, octal, character = escape.groups()
    if octal:
        return chr(int(octal, 8))
    number = next(filter(None, hexadecimal), None)
    return character if number is None else chr(int(number, 16))


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
    """The number of characters of a pattern when its counted repetitions are written out."""
    groups = [0]
    last = 0
    index = 0
    while index < len(pattern):
        repeated = _REPETITION.match(pattern, index)
        if repeated is not None:
            times = max(int(number[:9]) for number in repeated.groups("0") if number) if repeated[1] else 1
            groups[-1] += last * (max(times, 1) - 1)
            last *= max(times, 1)
            index = repeated.end()
            continue
        part = _REGEX_PART.match(pattern, index)
        assert part is not None, "any character is a part"
        index = part.end()
        if part[0] == "(":
            groups.append(0)
        elif part[0] == ")" and len(groups) > 1:
            last = groups.pop()
            groups[-1] += last
        else:
            last = 1
            groups[-1] += 1
    return sum(groups)
