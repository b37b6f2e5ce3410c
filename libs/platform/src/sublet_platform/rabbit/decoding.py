"""Lenient decoding of AMQP values that no client library would send, but that a broker accepts.

A publisher of events chooses every byte of the routing key, the message id and the headers. The client library raises
on bytes that are not UTF-8, on times after the year 9999 and on deep nesting. It raises in its reader, so the
connection closes, the message is redelivered, and no other message is ever received. Therefore such values are decoded
as something that the services can refuse later, for each message alone.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from pamqp import decode

TABLE_MAX_DEPTH = 32
"""Levels of nesting in headers. Brokers nest their own at most four levels deep."""


class Unreadable:
    """A header that cannot be decoded. Its text has the reason."""

    def __init__(self, reason: str) -> None:
        self._reason = reason

    def __str__(self) -> str:
        return self._reason

    __repr__ = __str__


def lenient_decoding() -> None:
    """Make the client library decode every message, in this whole process. A second call has no effect."""
    decode.METHODS["shortstr"] = _short_text
    decode.METHODS["timestamp"] = _property_time
    decode.METHODS["table"] = read_headers


def text_of(content: bytes) -> str:
    """Decode text. Bytes that are not UTF-8 become lone surrogates, which valid UTF-8 never contains."""
    return content.decode("utf-8", "surrogateescape")


def _short_text(data: bytes) -> tuple[int, str]:
    end = 1 + data[0]
    return end, text_of(data[1:end])


def _property_time(data: bytes) -> tuple[int, datetime | None]:
    """Decode a timestamp that nothing reads. An invalid one becomes None."""
    time = _time(data, 0)[1]
    return 8, time if isinstance(time, datetime) else None


def read_headers(data: bytes) -> tuple[int, dict[str, Any]]:
    """Decode a table that begins with its length. Returns the offset after it, and its content."""
    try:
        return _table(data, 0, 0)
    except (struct.error, IndexError, KeyError):
        return _extent(data, 0)[1], {"": Unreadable("headers in no form of AMQP's")}


# --- values: each decoder takes an offset and returns the next one, so that decoding takes one pass -----------

_Read = tuple[int, Any]


def _value(data: bytes, at: int, depth: int) -> _Read:
    kind = data[at : at + 1]
    if kind in _NESTED:
        return _NESTED[kind](data, at + 1, depth)
    return _PLAIN[kind](data, at + 1)


def _table(data: bytes, at: int, depth: int) -> _Read:
    at, end = _extent(data, at)
    if depth > TABLE_MAX_DEPTH:
        return end, Unreadable(f"a table nested deeper than {TABLE_MAX_DEPTH} levels")
    table: dict[str, Any] = {}
    while at < end:
        after = at + 1 + data[at]
        name = text_of(data[at + 1 : after])
        at, table[name] = _value(data, after, depth + 1)
    return end, table


def _array(data: bytes, at: int, depth: int) -> _Read:
    at, end = _extent(data, at)
    if depth > TABLE_MAX_DEPTH:
        return end, Unreadable(f"a list nested deeper than {TABLE_MAX_DEPTH} levels")
    items: list[Any] = []
    while at < end:
        at, item = _value(data, at, depth + 1)
        items.append(item)
    return end, items


def _extent(data: bytes, at: int) -> tuple[int, int]:
    (length,) = struct.unpack_from(">I", data, at)
    return at + 4, at + 4 + length


def _long_text(data: bytes, at: int) -> _Read:
    at, end = _extent(data, at)
    content = data[at:end]
    try:
        return end, content.decode()
    except UnicodeDecodeError:
        return end, content


def _bytes(data: bytes, at: int) -> _Read:
    at, end = _extent(data, at)
    return end, bytearray(data[at:end])


def _time(data: bytes, at: int) -> _Read:
    (seconds,) = struct.unpack_from(">Q", data, at)
    try:
        return at + 8, datetime.fromtimestamp(seconds, UTC)
    except (ValueError, OverflowError, OSError):
        return at + 8, Unreadable(f"the time {seconds}")


def _decimal(data: bytes, at: int) -> _Read:
    scale, digits = struct.unpack_from(">Bi", data, at)
    return at + 5, Unreadable(f"the decimal number {digits}e-{scale}")


def _nothing(data: bytes, at: int) -> _Read:
    return at, None


def _number(form: str) -> Callable[[bytes, int], _Read]:
    layout = struct.Struct(form)

    def read(data: bytes, at: int) -> _Read:
        return at + layout.size, layout.unpack_from(data, at)[0]

    return read


_NESTED = {b"F": _table, b"A": _array}
_PLAIN: dict[bytes, Callable[[bytes, int], _Read]] = {
    b"t": _number(">?"),
    b"b": _number(">b"),
    b"B": _number(">B"),
    b"s": _number(">h"),
    b"u": _number(">H"),
    b"I": _number(">i"),
    b"i": _number(">I"),
    b"l": _number(">q"),
    b"L": _number(">q"),
    b"f": _number(">f"),
    b"d": _number(">d"),
    b"D": _decimal,
    b"S": _long_text,
    b"T": _time,
    b"V": _nothing,
    b"\0": _nothing,
    b"x": _bytes,
}
