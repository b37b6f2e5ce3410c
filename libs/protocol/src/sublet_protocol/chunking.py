"""Many messages in few AMQP bodies, so that a batch needs one round trip to the broker and one write to its log."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from sublet_protocol import limits
from sublet_protocol.messages import Record, encode_one


class Chunk:
    """The encoded messages of one AMQP body, which is a JSON array.

    A body holds at most `limits.BATCH_MAX_ITEMS` messages and `limits.BATCH_MAX_BYTES` bytes. A single message that is
    larger travels alone.
    """

    __slots__ = ("_messages", "_size_bytes")

    def __init__(self) -> None:
        self._messages: list[bytes] = []
        self._size_bytes = 0

    def has_room_for(self, message: bytes) -> bool:
        """True for every message while the chunk is empty."""
        if not self._messages:
            return True
        fits = self._size_bytes + len(message) <= limits.BATCH_MAX_BYTES
        return fits and len(self._messages) < limits.BATCH_MAX_ITEMS

    def add(self, message: bytes) -> None:
        self._messages.append(message)
        self._size_bytes += len(message) + 1

    def body(self) -> bytes:
        return b"[" + b",".join(self._messages) + b"]"


def bodies_of(messages: Iterable[bytes]) -> Iterator[bytes]:
    """Encoded messages as few AMQP bodies, in order."""
    chunk: Chunk | None = None
    for message in messages:
        if chunk is None or not chunk.has_room_for(message):
            if chunk is not None:
                yield chunk.body()
            chunk = Chunk()
        chunk.add(message)
    if chunk is not None:
        yield chunk.body()


def pack(messages: Iterable[tuple[str, Record]]) -> Iterator[tuple[str, bytes]]:
    """Combine (routing key, message) pairs into (routing key, body) pairs.

    Messages with one routing key keep their order. Full bodies are returned at once, so that at most one chunk for
    each routing key is in memory.
    """
    chunks: dict[str, Chunk] = {}
    for key, message in messages:
        encoded = encode_one(message)
        chunk = chunks.get(key)
        if chunk is None or not chunk.has_room_for(encoded):
            if chunk is not None:
                yield key, chunk.body()
            chunk = chunks[key] = Chunk()
        chunk.add(encoded)
    for key, chunk in chunks.items():
        yield key, chunk.body()
