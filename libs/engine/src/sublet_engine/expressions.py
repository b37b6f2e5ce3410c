"""CEL expressions: event conditions, filters of triggers, parent conditions.

A condition is true only if its expression gives the boolean ``true``. An error (a missing field, a wrong type, too
much work) is not true, whatever it is; nothing that a payload holds can raise out of here.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from cel_expr_python import cel

from sublet_engine import limits

EVENT_VARIABLES = ("input",)
"""Of an event condition: ``input`` is the event's payload."""

FILTER_VARIABLES = ("input", "payload", "additional_metadata", "event_key", "event_id")
"""Of a trigger's filter: the event's payload, the filter's own payload, and what else the event carries."""

PARENT_VARIABLES = ("output",)
"""Of a parent condition: ``output`` is what the parent returned."""

Path = tuple[str, ...]
"""Field names from ``input`` downwards."""

_INT64 = range(-(2**63), 2**63)
_LARGEST = int(sys.float_info.max)
_EXACT_NUMBER = 2**53
"""CEL compares integers and doubles as doubles: beyond this, numbers that differ can be equal."""


class ExpressionError(ValueError):
    """The expression cannot be used. The text says which, where it is wrong, and what to do."""


class Facts:
    """The values of the variables, made ready once for any number of expressions."""

    __slots__ = ("_activations", "_values")

    def __init__(self, **values: object) -> None:
        self._values = values
        self._activations: dict[tuple[str, ...], Any] = {}

    def activation(self, variables: tuple[str, ...]) -> Any:
        """CEL's own form of the values. Raises RecursionError for data nested deeper than the stack allows."""
        activation = self._activations.get(variables)
        if activation is None:
            values = {name: presentable(self._values[name]) for name in variables if name in self._values}
            activation = self._activations[variables] = _environment(variables).Activation(values)
        return activation


class Expression:
    """A compiled expression. Evaluating it has no effects and is bounded in time and memory."""

    __slots__ = ("_program", "text", "variables")

    def __init__(self, text: str, variables: tuple[str, ...], program: Any) -> None:
        self.text = text
        self.variables = variables
        self._program = program

    def true(self, **values: object) -> bool:
        """Whether it is true for these values of its variables. Errors and other types than bool are not true."""
        return self.verdict(Facts(**values)) is True

    def verdict(self, facts: Facts) -> bool | None:
        """True or False; None if it failed on these values, or gave something else than a boolean."""
        try:
            result = self._program.eval(facts.activation(self.variables))
            # An error comes back as a value, and a truthy one: only the type tells.
            return bool(result.plain_value()) if result.type() == cel.Type.BOOL else None
        except Exception:
            # The library raises RuntimeError when the work exceeds its budget, and others for odd data. Whatever it
            # was, the expression was not true, and the other conditions of the batch must go on.
            return None


@lru_cache(maxsize=4_096)
def compile_expression(text: str, variables: tuple[str, ...] = EVENT_VARIABLES) -> Expression:
    """Compile an expression over these variables; equal texts are compiled once.

    Raises:
        ExpressionError: it is empty, too long, malformed, uses an unknown name, or can never be true or false.
    """
    if not text.strip():
        raise ExpressionError("an expression must not be empty; leave it out to accept everything")
    if len(text) > limits.EXPRESSION_MAX_CHARS:
        raise ExpressionError(
            f"the expression {_shown(text)} has {len(text):,} characters; at most {limits.EXPRESSION_MAX_CHARS:,} "
            "are allowed: compute the value before you publish it and compare it here"
        )
    if not text.isprintable() and re.search("[^\t\r\n -\ud7ff\ue000-\U0010ffff]", text):
        raise ExpressionError(f"the expression {_shown(text)} contains control characters; remove them")
    try:
        program = _environment(variables).compile(text)
    except Exception as error:
        raise ExpressionError(_explained(text, variables, str(error))) from error
    kind = program.return_type()
    if kind not in (cel.Type.BOOL, cel.Type.DYN):
        raise ExpressionError(
            f"the expression {_shown(text)} gives {kind.name()}, not true or false; compare it with something"
        )
    return Expression(text, variables, program)


@lru_cache(maxsize=16)
def _environment(variables: tuple[str, ...]) -> Any:
    return cel.NewEnv(variables=dict.fromkeys(variables, cel.Type.DYN))


_POSITION = re.compile(r"<input>:(\d+):(\d+): (.*)")


def _explained(text: str, variables: tuple[str, ...], error: str) -> str:
    found = _POSITION.search(error)
    where, what = (f" at line {found[1]}, column {found[2]}", found[3]) if found else ("", error.splitlines()[0])
    return (
        f"the expression {_shown(text)} is not valid CEL{where}: {what}; "
        f"it can use {', '.join(variables)} (see https://cel.dev for the language)"
    )


def _shown(text: str) -> str:
    return ascii(text if len(text) <= 120 else text[:117] + "...")


_ODD_CHARACTERS = re.compile("[\0\ud800-\udfff]")


def presentable(value: object) -> object:
    """JSON data as CEL can take it.

    An integer beyond 64 bits becomes a float, or else one such field would fail every expression on the payload. NUL
    and lone surrogates become U+FFFD: the library cuts text at NUL, and would find ``"a\\0b"`` equal to ``"a"``.
    """
    if isinstance(value, str):
        return _ODD_CHARACTERS.sub("\ufffd", value) if _ODD_CHARACTERS.search(value) else value
    if isinstance(value, Mapping):
        return {presentable(str(name)): presentable(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [presentable(item) for item in value]
    if isinstance(value, int) and value not in _INT64:
        return float(max(min(value, _LARGEST), -_LARGEST))
    return value


# --- equality terms -------------------------------------------------------------------------------------------


def canonical(value: object) -> str | None:
    """One text for all values that CEL finds equal; None for what no equality term can ask for.

    Booleans, numbers up to 2**53 and texts have one; lists, objects, null and larger numbers have none.
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


@lru_cache(maxsize=4_096)
def equality_terms(text: str) -> Mapping[Path, str]:
    """What a payload must hold for the expression to be true: canonical values by path.

    Finds the terms ``input.a.b == <literal>`` (either way round) of the top-level conjunction. Each is a necessary
    condition; what is doubtful gives none, so the expression itself still has to be evaluated.
    """
    tokens = _tokens(text)
    return {} if tokens is None else _conjunction(tokens)


def _tokens(text: str) -> Tokens | None:
    """None where this reader cannot be sure to read as CEL does: escapes, prefixes, comments, quotes in threes."""
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


def _conjunction(tokens: Tokens) -> dict[Path, str]:
    parts = _split_on_and(tokens)
    if parts is None:
        return {}
    if len(parts) > 1:
        terms: dict[Path, str] = {}
        for part in parts:
            terms.update(_conjunction(part))
        return terms
    if tokens[:1] == [("operator", "(")] and _closes_at_end(tokens):
        return _conjunction(tokens[1:-1])
    return _equality(tokens)


def _split_on_and(tokens: Tokens) -> list[Tokens] | None:
    """The parts between top-level ``&&``; None if something binds weaker than it, or the brackets do not match."""
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
    """Whether the bracket that opens first is the one that closes last."""
    depth = 0
    for index, (kind, text) in enumerate(tokens):
        if kind == "operator":
            depth += (text in _OPENING) - (text in _OPENING.values())
        if depth == 0:
            return index == len(tokens) - 1
    return False


def _equality(tokens: Tokens) -> dict[Path, str]:
    if tokens.count(("operator", "==")) != 1:
        return {}
    middle = tokens.index(("operator", "=="))
    left, right = tokens[:middle], tokens[middle + 1 :]
    path, value = _path(left), _literal(right)
    if path is None or value is None:
        path, value = _path(right), _literal(left)
    return {} if path is None or value is None else {path: value}


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
            case [("operator", "["), ("string", quoted), ("operator", "]"), *others]:
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
    """The canonical value that a payload holds at a path; None if there is none, or none that a term can ask for."""
    value = payload
    for name in path:
        if not isinstance(value, Mapping) or name not in value:
            return None
        value = value[name]
    return canonical(value)
