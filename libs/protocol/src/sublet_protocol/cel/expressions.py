"""CEL expressions: event conditions, filters of triggers, parent conditions.

A condition is true only if its expression gives the boolean ``true``. Any error (a missing field, a wrong type, too
much work) counts as not true; no payload can make an evaluation raise an exception.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from cel_expr_python import cel

from sublet_protocol import limits
from sublet_protocol.cel.cost import Cost, Extent, TooCostly, extent_of, read_cost

EVENT_VARIABLES = ("input",)
"""The variables of an event condition: ``input`` is the event's payload."""

FILTER_VARIABLES = ("input", "payload", "additional_metadata", "event_key", "event_id")
"""The variables of a trigger's filter: the payloads of the event and of the filter, and the event's other fields."""

PARENT_VARIABLES = ("output",)
"""The variables of a parent condition: ``output`` is the output of the parent."""

_INT64 = range(-(2**63), 2**63)
_LARGEST = int(sys.float_info.max)


class ExpressionError(ValueError):
    """The expression cannot be used. The text contains the expression, the position of the error and the cure."""


class Facts:
    """The values of the variables, converted once for any number of expressions."""

    __slots__ = ("_activations", "_base", "_extents", "_presentable", "_values")

    def __init__(self, **values: object) -> None:
        self._values = values
        self._base: Facts | None = None
        self._presentable: dict[str, object] = {}
        self._extents: dict[tuple[str, ...], Extent] = {}
        self._activations: dict[tuple[str, ...], Any] = {}

    def and_also(self, **values: object) -> Facts:
        """These values and more variables. The values of this object are converted once and shared."""
        more = Facts(**self._values, **values)
        more._base = self
        return more

    def extent(self, variables: tuple[str, ...]) -> Extent:
        """The size of the values of these variables."""
        extent = self._extents.get(variables)
        if extent is None:
            extent = extent_of(self._values[name] for name in variables if name in self._values)
            self._extents[variables] = extent
        return extent

    def activation(self, variables: tuple[str, ...]) -> Any:
        """The values in the form of the CEL library. Raises RecursionError for data that is nested too deeply."""
        activation = self._activations.get(variables)
        if activation is None:
            values = {name: self._converted(name) for name in variables if name in self._values}
            activation = self._activations[variables] = _environment(variables).Activation(values)
        return activation

    def _converted(self, name: str) -> object:
        if self._base is not None and name in self._base._values:
            return self._base._converted(name)
        if name not in self._presentable:
            self._presentable[name] = presentable(self._values[name])
        return self._presentable[name]


class Expression:
    """A compiled expression. An evaluation has no side effects and is bounded in time and memory."""

    __slots__ = ("_cost", "_program", "text", "variables")

    def __init__(self, text: str, variables: tuple[str, ...], program: Any, cost: Cost) -> None:
        self.text = text
        self.variables = variables
        self._program = program
        self._cost = cost

    def true(self, **values: object) -> bool:
        """Whether the expression is true for these values. Errors and other types than bool are not true."""
        return self.verdict(Facts(**values)) is True

    def verdict(self, facts: Facts) -> bool | None:
        """True or False; None if the evaluation failed, would cost too much, or gave no boolean."""
        try:
            extent = facts.extent(self.variables)
            if extent.values > limits.EXPRESSION_VALUES_MAX:
                return None
            if self._cost.work(extent) > limits.EXPRESSION_WORK_MAX_BYTES:
                return None
            result = self._program.eval(facts.activation(self.variables))
            # The library returns an error as a value that is truthy; only its type tells.
            return bool(result.plain_value()) if result.type() == cel.Type.BOOL else None
        except Exception:
            # The library raises RuntimeError when the work exceeds its budget, and other exceptions for unusual data.
            # In each case the expression is not true, and the other conditions of the batch must be evaluated.
            return None


@lru_cache(maxsize=4_096)
def compile_expression(text: str, variables: tuple[str, ...] = EVENT_VARIABLES) -> Expression:
    """Compile an expression over these variables; equal texts are compiled once.

    Raises:
        ExpressionError: the expression is empty, too long, malformed, uses an unknown name, is never a boolean, or has
            a cost that cannot be bounded.
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
    try:
        cost = read_cost(text)
    except TooCostly as error:
        raise ExpressionError(f"the expression {_shown(text)} could cost too much: {error}") from error
    return Expression(text, variables, program, cost)


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
    """JSON data in a form that CEL accepts.

    An integer beyond 64 bits becomes a float, because such a field would fail every expression on the payload. NUL
    and lone surrogates become U+FFFD: the library cuts text at NUL, so that ``"a\\0b"`` would equal ``"a"``.
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
