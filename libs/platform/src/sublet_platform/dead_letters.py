"""Dead letters: copies of messages that no service can handle, in the queue ``sublet.dead``, with the reason."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping

from sublet_platform.metrics import ServiceMetrics
from sublet_platform.ports import Broker, Delivery, Outgoing
from sublet_protocol.topology import DEAD

Reject = Callable[[Delivery, str], Awaitable[None]]
"""Dead-letters a message that cannot be used, with the reason; see `dead_letter`."""

REASON_MAX_CHARS = 500

HEADERS_MAX_BYTES = 65_536
"""The size of the original headers that a dead letter keeps. All headers of a message must fit into one AMQP frame of
128 KiB. RabbitMQ closes the connection that sends a larger one."""

_SHORT_TEXT_MAX_BYTES = 255


async def dead_letter(broker: Broker, delivery: Delivery, reason: str, metrics: ServiceMetrics, name: str) -> None:
    """Publish a copy to ``sublet.dead`` with all that `deploy/dead_letters.py requeue` needs.

    The caller acknowledges the original.

    Raises:
        BrokerUnavailable: the broker has not confirmed it.
    """
    await broker.publish([dead_letter_message(delivery, reason)])
    metrics.dead_lettered(name)


def dead_letter_message(delivery: Delivery, reason: str) -> Outgoing:
    """A message that can be encoded, although the delivery may contain any value of AMQP."""
    headers = {
        **_kept_headers(delivery.headers),
        "x-sublet-reason": _encodable(reason[:REASON_MAX_CHARS]),
        "x-sublet-exchange": delivery.exchange,
        "x-sublet-routing-key": _short(delivery.routing_key),
    }
    message_id = None if delivery.message_id is None else _short(delivery.message_id)
    return Outgoing(DEAD, _short(delivery.routing_key), delivery.body, message_id=message_id, headers=headers)


def _kept_headers(headers: Mapping[str, object]) -> dict[str, object]:
    kept: dict[str, object] = {}
    bytes_left = HEADERS_MAX_BYTES
    for name, value in headers.items():
        plain = _plain(value)
        bytes_left -= _encoded_bytes(name) + _encoded_bytes(plain)
        if bytes_left < 0:
            kept["x-sublet-headers-left-out"] = len(headers) - len(kept)
            break
        kept[_encodable(name)] = plain
    return kept


def _plain(value: object) -> object:
    """A value as JSON value. Other kinds of values become text."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return value if -(2**63) <= value < 2**63 else str(value)
    if isinstance(value, bytes | bytearray):
        return bytes(value).decode(errors="backslashreplace")
    if isinstance(value, Mapping):
        return {_encodable(str(name)): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return _encodable(str(value))


def _encoded_bytes(value: object) -> int:
    """An upper bound of the bytes that the value takes in an AMQP frame."""
    own = 16
    if isinstance(value, str):
        return own + len(_encodable(value).encode())
    if isinstance(value, Mapping):
        return own + sum(_encoded_bytes(name) + _encoded_bytes(item) for name, item in value.items())
    if isinstance(value, list):
        return own + sum(map(_encoded_bytes, value))
    return own


def _encodable(text: str) -> str:
    """Escape lone surrogates, which stand for bytes that are not UTF-8."""
    return text.encode(errors="backslashreplace").decode()


def _short(text: str) -> str:
    return _encodable(text).encode()[:_SHORT_TEXT_MAX_BYTES].decode(errors="ignore")
