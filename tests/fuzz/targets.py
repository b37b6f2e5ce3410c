"""What hostile input comes to. A target takes any bytes: it handles them, or refuses them with the declared error."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pydantic
from pamqp import encode as amqp

from fuzz import examples, shells
from sublet._declare.serialization import Codec
from sublet_engine.event.intake import InvalidEvent, ParsedEvent, parse_event
from sublet_engine.event.matching import lookup_keys
from sublet_platform.dead_letters import dead_letter_message
from sublet_platform.ports import Delivery, StoredEvent
from sublet_platform.rabbit.decoding import read_headers, text_of
from sublet_protocol import limits, messages
from sublet_protocol.cel.equality import equality_terms
from sublet_protocol.cel.expressions import ExpressionError, Facts, compile_expression

FRAME_MAX_BYTES = 131_072
_PAYLOAD = {"a": 1, "b": 3, "s": "text", "l": [1, 2, 3], "o": {"n": 1.5, "deep": [{"x": None}]}, "t": {"": "\0"}}


@dataclass(frozen=True)
class Target:
    attack: Callable[[bytes], None]
    seeds: tuple[bytes, ...]


def decoder(
    decode: Callable[[bytes], Any], encode: Callable[[Any], bytes] = messages.encode
) -> Callable[[bytes], None]:
    """Refused, or read as something that is the same after another journey."""

    def attack(data: bytes) -> None:
        try:
            read = decode(data)
        except messages.MalformedMessage:
            return
        assert encode(decode(encode(read))) == encode(read)

    return attack


def expression(data: bytes) -> None:
    """Refused when it is made, or it has a verdict; and its equality terms agree with it."""
    text = data.decode(errors="replace")
    terms = equality_terms(text)
    try:
        compiled = compile_expression(text)
    except ExpressionError:
        return
    verdict = compiled.verdict(Facts(input=_PAYLOAD))
    assert verdict in (True, False, None)
    if terms.whole:
        assert (verdict is True) == terms.hold(_PAYLOAD)
    elif verdict is True:
        assert terms.hold(_PAYLOAD), "an index that would miss this event"


def public_event(data: bytes) -> None:
    """A body with headers, a routing key and a message id of any bytes: an event, or a dead letter with a reason."""
    head, _, body = data.partition(b"\0\0")
    key, _, message_id = head[:255].partition(b"\n")
    headers = read_headers(_table(head))[1]
    delivery = Delivery(body, "sublet.events", text_of(key[:200]), False, text_of(message_id), headers, None, 1)
    try:
        arrival = parse_event(
            body, delivery.routing_key, delivery.message_id, headers, seen_at=1.0, new_id=lambda: "minted"
        )
    except InvalidEvent as refusal:
        _can_be_published(delivery, str(refusal))
        return
    event = StoredEvent(
        arrival.id, 1, arrival.key, arrival.payload, arrival.scope, arrival.metadata, arrival.priority, 1.0
    )
    parsed_event = ParsedEvent(event)
    assert lookup_keys(parsed_event, [("/a",), ("/o/n",)])
    assert compile_expression("input.a == 1 || has(input.o)").verdict(parsed_event.facts) in (True, False, None)


def headers(data: bytes) -> None:
    """Whatever a broker hands out as headers can be read, and sent to the dead letters."""
    end, read = read_headers(_table(data))
    assert end == 4 + len(data[: FRAME_MAX_BYTES - 4])
    _can_be_published(Delivery(b"", "", text_of(data[:255]), False, text_of(data[-255:]), read, None, 1), "a reason")


def users_data(data: bytes) -> None:
    """Inputs and outputs that do not fit are refused by the one error that the SDK handles."""
    for codec in (Codec[Any](dict[str, Any]), Codec[Any](_Order)):
        try:
            value = codec.decode(data)
        except pydantic.ValidationError:
            continue
        codec.encode(value)


class _Order(pydantic.BaseModel):
    order_id: int
    note: str | None = None
    parts: list[dict[str, float]] = []


def _table(data: bytes) -> bytes:
    content = data[: FRAME_MAX_BYTES - 4]
    return struct.pack(">I", len(content)) + content


def _can_be_published(delivery: Delivery, reason: str) -> None:
    letter = dead_letter_message(delivery, reason)
    assert len(amqp.field_table(dict(letter.headers))) < FRAME_MAX_BYTES - 1_024  # type: ignore[arg-type]
    amqp.short_string(letter.routing_key)
    amqp.short_string(letter.message_id or "")
    assert letter.headers["x-sublet-reason"]
    assert len(letter.body) <= max(len(delivery.body), limits.PAYLOAD_MAX_BYTES)


_HEADERS = (
    b"\x01kS\0\0\0\x05value\x01nI\0\0\0\x07",
    b"\x05scopeS\0\0\0\x01s\x08priorityb\x02\x01tT\0\0\0\0\0\0\0\x01\x01dD\x02\0\0\0\x09",
    b"\x01aA\0\0\0\x0dtS\0\0\0\x02xyV\x01\x01\x01\x01\x01fF\0\0\0\x03\x01vV",
)
TARGETS: dict[str, Target] = {
    "for-shard": Target(decoder(messages.decode_for_shard), examples.bodies(examples.TO_SHARD)),
    "for-worker": Target(decoder(messages.decode_for_worker), examples.bodies(examples.TO_WORKER)),
    "for-client": Target(decoder(messages.decode_for_client), examples.bodies(examples.TO_CLIENT)),
    "for-timer": Target(decoder(messages.decode_for_timer), examples.bodies(examples.TO_TIMER)),
    "for-ingest": Target(decoder(messages.decode_for_ingest), examples.bodies(examples.TO_INGEST)),
    "queries": Target(decoder(messages.decode_queries), examples.bodies(examples.QUERIES)),
    "ticket": Target(decoder(messages.decode_ticket, messages.encode_one), (examples.TICKET,)),
    "expression": Target(expression, examples.EXPRESSIONS),
    "headers": Target(headers, _HEADERS),
    "public-event": Target(public_event, tuple(b"paid\nid\0\0" + body for body in examples.EVENTS)),
    "users-data": Target(users_data, (*examples.EVENTS, b'{"order_id":1,"note":"n","parts":[{"p":1.5}]}')),
    "ingest-shell": Target(shells.ingest, (*examples.bodies(examples.TO_INGEST), *examples.EVENTS)),
    "timer-shell": Target(shells.timer, examples.bodies(examples.TO_TIMER)),
    "scheduler-shell": Target(
        shells.scheduler, (*examples.bodies(examples.TO_SHARD), *examples.bodies(examples.QUERIES))
    ),
}
