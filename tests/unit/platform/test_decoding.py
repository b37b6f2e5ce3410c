"""Lenient decoding: values that the client library rejects are decoded, and refused for each message alone."""

from __future__ import annotations

import struct
from datetime import UTC, datetime

import pytest
from pamqp import commands, decode, frame, header
from pamqp import encode as amqp

from sublet_engine.event.intake import InvalidEvent, parse_event
from sublet_platform.dead_letters import HEADERS_MAX_BYTES, dead_letter_message
from sublet_platform.ports import Delivery
from sublet_platform.rabbit.decoding import TABLE_MAX_DEPTH, Unreadable, lenient_decoding, read_headers
from sublet_protocol import limits

FRAME_MAX_BYTES = 131_072


def table(content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + content


def delivery(key: str = "paid", message_id: str | None = None, headers: dict[str, object] | None = None) -> Delivery:
    return Delivery(b"{}", "sublet.events", key, False, message_id, headers or {}, None, 1)


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"text": "grüße", "yes": True, "no": False, "none": None},
        {"numbers": [1, -1, 300, 70_000, 2**40, -(2**40)], "half": 0.5, "bytes": bytearray(b"\0\xff")},
        {"table": {"in": {"a": ["list", {"of": "tables"}]}}, "at": datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)},
    ],
)
def test_values_encoded_by_the_library_are_decoded_as_the_library_does(values: dict[str, object]) -> None:
    written = amqp.field_table(values)  # type: ignore[arg-type]
    assert read_headers(written) == decode.field_table(written) == (len(written), values)


def test_bytes_that_are_not_utf_8_are_decoded_and_remain_distinct() -> None:
    _, read = read_headers(table(b"\x01\xffS\0\0\0\x01\xfe" + b"\x01\xfdV"))
    assert list(read) == ["\udcff", "\udcfd"]
    assert read["\udcff"] == b"\xfe"


def test_invalid_times_and_deep_nesting_are_decoded_as_unreadable() -> None:
    deep = b""
    for _ in range(TABLE_MAX_DEPTH + 1_000):
        deep = b"\x01kF" + table(deep)
    _, read = read_headers(table(b"\x01tT" + b"\xff" * 8 + deep))
    assert isinstance(read["t"], Unreadable)
    value = read["k"]
    for _ in range(TABLE_MAX_DEPTH):
        value = value["k"] if isinstance(value, dict) else value
    assert isinstance(value, Unreadable)


def test_an_invalid_table_has_the_length_that_it_declares() -> None:
    for content in (b"\xff", b"\x01kZ", b"\x01kS\xff\xff\xff\xff", b"\x01kl\0", b"\x05k"):
        end, read = read_headers(table(content) + b"rest")
        assert end == 4 + len(content) or set(map(type, read.values())) <= {str, bytes}


def test_every_frame_can_be_decoded() -> None:
    lenient_decoding()
    key = b"\xff\xfe"
    deliver = struct.pack(">HH", 60, 60) + b"\x01c" + struct.pack(">Q", 1) + b"\0" + b"\0" + bytes([len(key)]) + key
    _, _, read = frame.unmarshal(_framed(1, deliver))
    assert isinstance(read, commands.Basic.Deliver)
    assert read.routing_key == "\udcff\udcfe"
    properties = table(b"\x01tT" + b"\xff" * 8) + b"\x02\xff\xfe" + b"\xff" * 8
    head = struct.pack(">HHQH", 60, 0, 0, 1 << 13 | 1 << 7 | 1 << 6) + properties
    _, _, read = frame.unmarshal(_framed(2, head))
    assert isinstance(read, header.ContentHeader)
    assert (read.properties.message_id, read.properties.timestamp) == ("\udcff\udcfe", None)


def _framed(kind: int, payload: bytes) -> bytes:
    return struct.pack(">BHI", kind, 1, len(payload)) + payload + b"\xce"


@pytest.mark.parametrize(
    ("hostile", "reason"),
    [
        (delivery("a.\udcff"), "the routing key is not UTF-8"),
        (delivery(message_id="\udcff"), "the message id is not UTF-8"),
        (delivery(headers={"\udcff": 1}), "the name of a header is not UTF-8"),
        (delivery(headers={"at": Unreadable("the time 9")}), "holds the time 9, which is not a JSON value"),
        (delivery(headers={"nested": {"in": [Unreadable("x" * 500)]}}), r"xxx\.\.\., which is not a JSON value"),
    ],
)
def test_an_event_with_such_a_value_is_refused_with_a_reason(hostile: Delivery, reason: str) -> None:
    with pytest.raises(InvalidEvent, match=reason):
        parse_event(
            hostile.body, hostile.routing_key, hostile.message_id, hostile.headers, seen_at=1.0, new_id=lambda: "id"
        )


@pytest.mark.parametrize(
    "hostile",
    [
        delivery("a.\udcff" * 60, "\udcff" * 255, {"\udcff": "\udcfe", "bytes": b"\xff", "more": bytearray(b"\xff")}),
        delivery(headers={"large": "x" * 130_000, "small": 1}),
        delivery(headers={"numbers": [1] * 20_000}),
        delivery(headers={f"{n:05}": None for n in range(15_000)}),
        delivery(
            headers={
                "odd": [Unreadable("x"), 2**70, {"a": Unreadable("y")}],
                "nan": float("nan"),
                "at": datetime.now(UTC),
            }
        ),
    ],
)
def test_a_dead_letter_of_any_delivery_fits_into_one_frame(hostile: Delivery) -> None:
    letter = dead_letter_message(hostile, "because \udcff " + "x" * 10_000)
    written = amqp.field_table(dict(letter.headers))  # type: ignore[arg-type]
    assert len(written) < HEADERS_MAX_BYTES + 2_000 < FRAME_MAX_BYTES
    assert len(amqp.short_string(letter.routing_key) + amqp.short_string(letter.message_id or "")) <= 512
    assert str(letter.headers["x-sublet-reason"]).startswith("because \\udcff ")


def test_omitted_headers_are_counted() -> None:
    letter = dead_letter_message(
        delivery(headers={"small": 1, "large": "x" * limits.METADATA_MAX_BYTES, "after": 2}), "too large"
    )
    assert letter.headers["small"] == 1
    assert letter.headers["x-sublet-headers-left-out"] == 2
