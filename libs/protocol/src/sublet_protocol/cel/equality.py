"""Equality terms of expressions: values that a payload must contain, found without an evaluation.

``input.order_id == 42 && input.amount > 10`` can only be true for a payload whose ``order_id`` is 42. Such terms
become part of the key by which a wait is looked up. Syntax that this small parser might read differently from CEL
(escapes, prefixes, comments, other operators) gives no term.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import NamedTuple

from sublet_protocol.cel.expressions import presentable

Path = tuple[str, ...]
"""Field names from ``input`` downwards."""

_EXACT_NUMBER = 2**53
"""CEL compares integers and doubles as doubles: beyond this, different numbers can be equal."""


class Terms(NamedTuple):
    """``values``: canonical values by path. The expression can be true only if the payload contains all of them.

    ``whole``: the expression has no other parts, so it is true exactly if the payload contains all of them.
    """

    values: Mapping[Path, str]
    whole: bool

    def hold(self, payload: object) -> bool:
        return all(value_at(payload, path) == value for path, value in self.values.items())


_NONE = Terms({}, False)


def canonical(value: object) -> str | None:
    """One text for all values that CEL treats as equal; None for a value that no equality term can contain.

    Booleans, numbers up to 2**53 and texts have such a text; lists, objects, null and larger numbers do not.
    """
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        if not abs(value) < _EXACT_NUMBER:
            return None
        return str(int(value)) if value == int(value) else repr(float(value))
    if isinstance(value, str):
        return "'" + str(presentable(value))
    return None


_TOKEN = re.compile(
    r"""
    (?P<space> [ \t\r\n\f]+ )
  | (?P<string> (?: "[^"\\\r\n]*" | '[^'\\\r\n]*' ) (?! ["'] ) )
  | (?P<number> (?: \d+ \. \d+ | \. \d+ | \d+ ) (?: [eE] [+-]? \d+ )? (?! [\w.] ) )
  | (?P<name> [A-Za-z_][A-Za-z0-9_]* (?! ["'] ) )
  | (?P<operator> && | \|\| | == | != | <= | >= | [-+*%<>!?:.,()\[\]{}] | / (?! / ) )
    """,
    re.VERBOSE | re.ASCII,
)
_OPENING = {"(": ")", "[": "]", "{": "}"}

Tokens = list[tuple[str, str]]
"""(kind, text) of each token, without spaces."""


@lru_cache(maxsize=16_384)
def equality_terms(text: str) -> Terms:
    """The terms ``input.a.b == <literal>`` (either way round) of an expression's top-level conjunction."""
    tokens = _tokens(text)
    return _NONE if tokens is None else _conjunction(tokens)


def _tokens(text: str) -> Tokens | None:
    """The tokens of an expression; None if CEL might read the text differently."""
    tokens: Tokens = []
    position = 0
    while position < len(text):
        found = _TOKEN.match(text, position)
        if found is None or found.lastgroup is None:
            return None
        if found.lastgroup != "space":
            tokens.append((found.lastgroup, found[0]))
        position = found.end()
    return tokens


def _conjunction(tokens: Tokens) -> Terms:
    parts = _split_on_and(tokens)
    if parts is None:
        return _NONE
    if len(parts) > 1:
        return _joined([_conjunction(part) for part in parts])
    if tokens[:1] == [("operator", "(")] and _closes_at_end(tokens):
        return _conjunction(tokens[1:-1])
    return _equality(tokens)


def _joined(parts: list[Terms]) -> Terms:
    values: dict[Path, str] = {}
    whole = True
    for part in parts:
        whole = whole and part.whole and all(values.get(path, value) == value for path, value in part.values.items())
        values.update(part.values)
    return Terms(values, whole)


def _split_on_and(tokens: Tokens) -> list[Tokens] | None:
    """The parts between top-level ``&&``; None if a weaker operator is at the top level, or brackets do not match."""
    parts: list[Tokens] = [[]]
    open_brackets: list[str] = []
    for kind, text in tokens:
        if kind == "operator":
            if text in _OPENING:
                open_brackets.append(_OPENING[text])
            elif text in _OPENING.values():
                if not open_brackets or open_brackets.pop() != text:
                    return None
            elif not open_brackets and text in ("||", "?"):
                return None
            elif not open_brackets and text == "&&":
                parts.append([])
                continue
        parts[-1].append((kind, text))
    return None if open_brackets else parts


def _closes_at_end(tokens: Tokens) -> bool:
    """Whether the first token opens a bracket that the last token closes."""
    depth = 0
    for index, (kind, text) in enumerate(tokens):
        if kind == "operator":
            depth += (text in _OPENING) - (text in _OPENING.values())
        if depth == 0:
            return index == len(tokens) - 1
    return False


def _equality(tokens: Tokens) -> Terms:
    if tokens.count(("operator", "==")) != 1:
        return _NONE
    middle = tokens.index(("operator", "=="))
    left, right = tokens[:middle], tokens[middle + 1 :]
    path, value = _path(left), _literal(right)
    if path is None or value is None:
        path, value = _path(right), _literal(left)
    return _NONE if path is None or value is None else Terms({path: value}, True)


def _path(tokens: Tokens) -> Path | None:
    """The path of ``input.a["b"]`` and the like."""
    if tokens[:1] != [("name", "input")]:
        return None
    path: list[str] = []
    rest = tokens[1:]
    while rest:
        match rest:
            case [("operator", "."), ("name", name), *others]:
                path.append(name)
            case [("operator", "["), ("string", quoted), ("operator", "]"), *others] if "\ufffd" not in quoted:
                path.append(quoted[1:-1])
            case _:
                return None
        rest = others
    return tuple(path) or None


def _literal(tokens: Tokens) -> str | None:
    """The canonical value of a literal."""
    match tokens:
        case [("string", quoted)]:
            return canonical(quoted[1:-1])
        case [("name", "true" | "false" as name)]:
            return name
        case [("number", number)]:
            return canonical(_number(number))
        case [("operator", "-"), ("number", number)]:
            return canonical(-_number(number))
        case _:
            return None


def _number(text: str) -> int | float:
    return int(text) if text.isdecimal() else float(text)


def value_at(payload: object, path: Path) -> str | None:
    """The canonical value of a payload at a path; None if the path or a canonical value does not exist."""
    value = payload
    for name in path:
        if not isinstance(value, Mapping) or name not in value:
            return None
        value = value[name]
    return canonical(value)
