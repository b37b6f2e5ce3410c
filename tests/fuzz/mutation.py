"""Valid messages made hostile: each change keeps most of the form, so that it comes past the first check."""

from __future__ import annotations

import json
from collections.abc import Callable
from random import Random
from typing import Any

CHANGES_MAX = 4
DEEP = 1_500
LONG = 20_000
SEPARATOR = b"\n\x1e\n"
"""Between the messages of one input."""


class Text(str):
    """JSON as it is to be written."""


class Pairs(list[tuple[str, Any]]):
    """An object, which may have a name twice."""


HOSTILE: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    2**31,
    2**53 + 1,
    2**63,
    -(2**64),
    0.5,
    1e308,
    -1e-320,
    Text("NaN"),
    Text("Infinity"),
    Text("1e999"),
    Text("9" * 500),
    Text('"\\ud800"'),
    Text('"\\u0000"'),
    Text('"\xff"'),
    "",
    ".",
    "a.b@c#d",
    "run\nwith\0controls",
    "*",
    "*" * 200,
    "input." * 300,
    "input.a.map(x, input.a.map(y, x + y)).size() > 0",
    "input.s.matches('(a{0,1000}){0,1000}')",
    "x" * LONG,
    "é" * 100,
    [],
    {},
    Text("[" * DEEP + "]" * DEEP),
    Text('{"a":' * DEEP + "1" + "}" * DEEP),
)


def mutated(body: bytes, chance: Random) -> bytes:
    """The body with a few changes."""
    try:
        tree = json.loads(body, object_pairs_hook=Pairs)
    except (ValueError, RecursionError):
        return _damaged(body, chance)
    holder = [tree]
    for _ in range(chance.randint(1, CHANGES_MAX)):
        container, place = chance.choice(_places(holder))
        chance.choice(_CHANGES)(container, place, chance)
    written = _written(holder[0]).encode("utf-8", "surrogatepass").replace("\xff".encode(), b"\xff")
    return _damaged(written, chance) if chance.random() < 0.1 else written


def _places(root: list[Any]) -> list[tuple[list[Any], int]]:
    """Every value's container, and its place there."""
    found: list[tuple[list[Any], int]] = []
    waiting = [root]
    while waiting:
        container = waiting.pop()
        for place in range(len(container)):
            found.append((container, place))
            value = _value(container, place)
            if isinstance(value, list):
                waiting.append(value)
    return found


def _value(container: list[Any], place: int) -> Any:
    return container[place][1] if isinstance(container, Pairs) else container[place]


def _put(container: list[Any], place: int, value: Any) -> None:
    container[place] = (container[place][0], value) if isinstance(container, Pairs) else value


def _replace(container: list[Any], place: int, chance: Random) -> None:
    _put(container, place, chance.choice(HOSTILE))


def _leave_out(container: list[Any], place: int, chance: Random) -> None:
    if len(container) > 1:
        del container[place]


def _repeat(container: list[Any], place: int, chance: Random) -> None:
    container.insert(chance.randint(0, len(container)), container[place])


def _add(container: list[Any], place: int, chance: Random) -> None:
    value = chance.choice(HOSTILE)
    container.append((chance.choice(("t", "id", "", "x" * 300)), value) if isinstance(container, Pairs) else value)


def _wrap(container: list[Any], place: int, chance: Random) -> None:
    _put(container, place, [_value(container, place)])


def _exchange(container: list[Any], place: int, chance: Random) -> None:
    other = chance.randrange(len(container))
    mine = _value(container, place)
    _put(container, place, _value(container, other))
    _put(container, other, mine)


_CHANGES: tuple[Callable[[list[Any], int, Random], None], ...] = (
    _replace,
    _replace,
    _replace,
    _leave_out,
    _repeat,
    _add,
    _wrap,
    _exchange,
)


def _written(value: Any) -> str:
    if isinstance(value, Text):
        return value
    if isinstance(value, Pairs):
        return "{" + ",".join(f"{json.dumps(name)}:{_written(item)}" for name, item in value) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(_written, value)) + "]"
    return json.dumps(value)


def _damaged(body: bytes, chance: Random) -> bytes:
    """Bytes changed, cut, or put in."""
    changed = bytearray(body or b"x")
    for _ in range(chance.randint(1, CHANGES_MAX)):
        place = chance.randrange(len(changed))
        match chance.randrange(4):
            case 0:
                changed[place] = chance.randrange(256)
            case 1:
                del changed[place + 1 :]
            case 2:
                changed[place:place] = b"\xed\xa0\x80"
            case _:
                changed[place:place] = changed[: chance.randrange(len(changed) + 1)]
    return bytes(changed[:1_000_000])
