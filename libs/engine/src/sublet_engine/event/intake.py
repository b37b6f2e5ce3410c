"""Incoming events: validation, ids, and the position of each event in the order of all events."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Generic, Protocol, TypeVar

import msgspec

from sublet_protocol import limits
from sublet_protocol.cel.expressions import Facts

METADATA_MAX_DEPTH = 20
"""Levels of nesting in the metadata of one event. Deeper metadata is a mistake; databases refuse a hundred levels."""

_PRIORITIES = (1, 2, 3)
_INT64_MAX = 2**63 - 1
_SHOWN_CHARS = 80


class InvalidEvent(ValueError):
    """The message is not a valid event. The text gives the reason, for a person who inspects the dead letters."""


class Event(Protocol):
    """An event that is stored. ``payload`` is JSON text. Times are Unix seconds."""

    @property
    def id(self) -> str: ...
    @property
    def seq(self) -> int: ...
    @property
    def key(self) -> str: ...
    @property
    def payload(self) -> str: ...
    @property
    def scope(self) -> str | None: ...
    @property
    def metadata(self) -> Mapping[str, object]: ...
    @property
    def priority(self) -> int | None: ...
    @property
    def seen_at(self) -> float: ...


AnyEvent = TypeVar("AnyEvent", bound=Event, covariant=True)


class Arrival(msgspec.Struct, frozen=True):
    """An event that was accepted and has no place in the order of events yet."""

    id: str
    key: str
    payload: str
    scope: str | None
    metadata: Mapping[str, object]
    priority: int | None
    seen_at: float


def parse_event(
    body: bytes,
    routing_key: str,
    message_id: str | None,
    headers: Mapping[str, object],
    *,
    seen_at: float,
    new_id: Callable[[], str],
) -> Arrival:
    """Read a message of the public exchange. ``seen_at``: Unix seconds.

    The routing key is the event's key, the body its payload: a JSON object. The headers ``scope`` (text) and
    ``priority`` (1 to 3) are read; those that begin with ``x-`` belong to the broker; all others are metadata.

    Raises:
        InvalidEvent: the message breaks one of these rules, or a limit.
    """
    if not routing_key or len(routing_key) > limits.NAME_MAX_CHARS:
        raise InvalidEvent(f"the routing key is the event's key: 1 to {limits.NAME_MAX_CHARS} characters")
    _check_utf8(routing_key, "the routing key")
    _check_utf8(message_id or "", "the message id")
    return Arrival(
        id=_event_id(routing_key, message_id, new_id),
        key=routing_key,
        payload=_payload(body),
        scope=_scope(headers.get("scope")),
        metadata=_metadata(headers),
        priority=_priority(headers.get("priority")),
        seen_at=seen_at,
    )


def _check_utf8(text: str, what: str) -> None:
    """The AMQP client decodes bytes that are not UTF-8 as lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InvalidEvent(f"{what} is not UTF-8") from None


def _event_id(key: str, message_id: str | None, new_id: Callable[[], str]) -> str:
    """The message id, which is the idempotency key; combined with the event's key unless it is a UUID.

    Otherwise two publishers that both count ``1``, ``2``, ``3`` would lose events of each other.
    """
    if not message_id:
        return new_id()
    return message_id if _is_uuid(message_id) else f"{key}:{message_id}"


def _is_uuid(text: str) -> bool:
    digits = text.replace("-", "")
    return len(digits) == 32 and all(c in "0123456789abcdefABCDEF" for c in digits)


def _payload(body: bytes) -> str:
    if len(body) > limits.PAYLOAD_MAX_BYTES:
        raise InvalidEvent(
            f"the payload is too large: at most {limits.PAYLOAD_MAX_BYTES:,} bytes are allowed; "
            "store what is large elsewhere and send a reference to it"
        )
    try:
        payload = msgspec.json.decode(body)
        text = body.decode()
    except RecursionError:
        raise InvalidEvent("the payload is nested too deeply") from None
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise InvalidEvent(f"the payload is not JSON: {error}") from None
    if not isinstance(payload, dict):
        raise InvalidEvent(f"the payload must be a JSON object, not {_json_type(payload)}")
    return text


def _scope(value: object) -> str | None:
    if value is None:
        return None
    scope = _text(value)
    if scope is None or len(scope) > limits.NAME_MAX_CHARS:
        raise InvalidEvent(f"the header 'scope' must be a text of at most {limits.NAME_MAX_CHARS} characters")
    return scope


def _priority(value: object) -> int | None:
    if value is None:
        return None
    # Command line tools can only send text headers.
    text = _text(value)
    priority = int(text) if text is not None and text.isdecimal() and len(text) == 1 else value
    if isinstance(priority, bool) or priority not in _PRIORITIES:
        raise InvalidEvent(f"the header 'priority' must be 1, 2 or 3, not {_brief(value)}")
    return int(priority)


def _metadata(headers: Mapping[str, object]) -> Mapping[str, object]:
    metadata = {
        name: _json_value(value, name)
        for name, value in headers.items()
        if name not in ("scope", "priority") and not name.startswith("x-")
    }
    try:
        size = len(msgspec.json.encode(metadata)) if metadata else 0
    except UnicodeEncodeError:
        raise InvalidEvent("the name of a header is not UTF-8") from None
    if size > limits.METADATA_MAX_BYTES:
        raise InvalidEvent(
            f"the headers have {size:,} bytes as JSON; at most {limits.METADATA_MAX_BYTES:,} are allowed"
        )
    return metadata


def _json_value(value: object, header: str, depth: int = 0) -> object:
    """The value as JSON. UTF-8 bytes become text, because some clients send all texts as bytes."""
    if depth > METADATA_MAX_DEPTH:
        raise InvalidEvent(f"the header {header!r} is nested deeper than {METADATA_MAX_DEPTH} levels")
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int) and abs(value) <= _INT64_MAX:
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    text = _text(value)
    if text is not None:
        return text
    if isinstance(value, Mapping):
        return {str(name): _json_value(item, header, depth + 1) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_json_value(item, header, depth + 1) for item in value]
    raise InvalidEvent(f"the header {header!r} holds {_brief(value)}, which is not a JSON value")


def _brief(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN_CHARS else text[:_SHOWN_CHARS] + "..."


def _text(value: object) -> str | None:
    if isinstance(value, bytes | bytearray):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return None
    return value if isinstance(value, str) else None


def _json_type(value: object) -> str:
    if value is None:
        return "null"
    names = {bool: "a boolean", int: "a number", float: "a number", str: "a text", list: "an array"}
    return names[type(value)]


class Sequence:
    """Assigns each event its position in the order of all events: microseconds since 1970, unique and increasing."""

    def __init__(self) -> None:
        self.last = 0
        """The latest position that was assigned or skipped."""

    def next(self, now: float) -> int:
        self.last = max(int(now * 1_000_000), self.last + 1)
        return self.last

    def advance_past(self, position: int) -> None:
        """Later positions will be greater than this one, even if it comes from a process whose clock is ahead."""
        self.last = max(self.last, position)


class ParsedEvent(Generic[AnyEvent]):
    """An event whose payload is decoded at most once, for any number of expressions."""

    def __init__(self, event: AnyEvent) -> None:
        self.event = event
        self._payload: Any = msgspec.UNSET
        self._facts: Facts | None = None

    @property
    def payload(self) -> Any:
        if self._payload is msgspec.UNSET:
            self._payload = msgspec.json.decode(self.event.payload)
        return self._payload

    @property
    def facts(self) -> Facts:
        """The variables of event conditions: ``input``."""
        if self._facts is None:
            self._facts = Facts(input=self.payload)
        return self._facts

    def facts_for_filter(self, payload: Mapping[str, object]) -> Facts:
        event = self.event
        return self.facts.and_also(
            payload=payload,
            additional_metadata=event.metadata,
            event_key=event.key,
            event_id=event.id,
        )
