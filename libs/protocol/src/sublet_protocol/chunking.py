"""Many messages in few AMQP bodies: one round trip to the broker for a batch, and one write to its log."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from sublet_protocol import limits
from sublet_protocol.messages import Record, encode_one


def pack(messages: Iterable[tuple[str, Record]]) -> Iterator[tuple[str, bytes]]:
    """Gather (routing key, message) into (routing key, body); a body is a JSON array of messages.

    Messages with one routing key keep their order. A body holds at most `limits.BATCH_MAX_ITEMS` messages and
    `limits.BATCH_MAX_BYTES` bytes; a single message that is larger travels alone. Full bodies come out at once, so
    that no more than one for each routing key is in memory.
    """
    gathered: dict[str, list[bytes]] = {}
    sizes: dict[str, int] = {}
    for key, message in messages:
        encoded = encode_one(message)
        items = gathered.setdefault(key, [])
        full = len(items) >= limits.BATCH_MAX_ITEMS or sizes.get(key, 0) + len(encoded) > limits.BATCH_MAX_BYTES
        if items and full:
            yield key, _array(items)
            items = gathered[key] = []
            sizes[key] = 0
        items.append(encoded)
        sizes[key] = sizes.get(key, 0) + len(encoded) + 1
    for key, items in gathered.items():
        yield key, _array(items)


def _array(items: list[bytes]) -> bytes:
    return b"[" + b",".join(items) + b"]"
