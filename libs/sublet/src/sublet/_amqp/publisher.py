"""Publishes records of many callers in few messages."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from contextvars import Context
from dataclasses import dataclass, field

from sublet_protocol.chunking import Chunk

Publish = Callable[[str, bytes], Awaitable[None]]
"""Publishes a body to a routing key; returns when RabbitMQ has confirmed it."""


class BatchPublisher:
    """Publishes one message at a time for each routing key, in order.

    A record is published at once if no message for its routing key is unconfirmed. Otherwise it waits, and all waiting
    records form the next message: a JSON array of at most `limits.BATCH_MAX_ITEMS` records and
    `limits.BATCH_MAX_BYTES` bytes.

    Args:
        publish: its errors reach the callers whose records were in the message.
        drop_cancelled: do not publish waiting records whose caller was cancelled.
    """

    def __init__(self, publish: Publish, *, drop_cancelled: bool) -> None:
        self._publish = publish
        self._drop_cancelled = drop_cancelled
        self._waiting: dict[str, deque[_WaitingRecord]] = {}
        """Waiting records of each routing key that has an unconfirmed message."""
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def idle(self) -> bool:
        """Everything is confirmed, or has failed."""
        return not self._waiting

    def add(self, routing_key: str, record: bytes) -> asyncio.Future[None]:
        """Publish an encoded record. The future ends when it is confirmed, or with the error of `publish`."""
        added = _WaitingRecord(record)
        waiting = self._waiting.get(routing_key)
        if waiting is None:
            waiting = self._waiting[routing_key] = deque()
            # An empty context: the task outlives its first caller, and must not count as a branch of a durable task.
            task = asyncio.get_running_loop().create_task(self._run(routing_key, waiting), context=Context())
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard, context=Context())
        waiting.append(added)
        return added.confirmed

    async def send(self, routing_key: str, records: Iterable[bytes]) -> None:
        """Publish encoded records. Returns when all are confirmed; raises the error of `publish` for one of them."""
        confirmed = [self.add(routing_key, record) for record in records]
        if len(confirmed) == 1:
            await confirmed[0]
        else:
            await asyncio.gather(*confirmed)

    def close(self) -> None:
        """Stop publishing. Records that are not confirmed may be lost."""
        for task in list(self._tasks):
            task.cancel()

    async def _run(self, routing_key: str, waiting: deque[_WaitingRecord]) -> None:
        try:
            while True:
                chunk, records = self._next_chunk(waiting)
                if not records:
                    return
                await self._publish_chunk(routing_key, chunk, records)
        finally:
            del self._waiting[routing_key]

    async def _publish_chunk(self, routing_key: str, chunk: Chunk, records: list[_WaitingRecord]) -> None:
        try:
            await self._publish(routing_key, chunk.body())
        except Exception as error:
            for record in records:
                if not record.confirmed.done():
                    record.confirmed.set_exception(error)
        else:
            for record in records:
                if not record.confirmed.done():
                    record.confirmed.set_result(None)

    def _next_chunk(self, waiting: deque[_WaitingRecord]) -> tuple[Chunk, list[_WaitingRecord]]:
        """Take as many waiting records as one message may hold."""
        chunk, records = Chunk(), []
        while waiting:
            if self._drop_cancelled and waiting[0].confirmed.cancelled():
                waiting.popleft()
            elif chunk.has_room_for(waiting[0].encoded):
                records.append(waiting.popleft())
                chunk.add(records[-1].encoded)
            else:
                break
        return chunk, records


@dataclass(slots=True, eq=False)
class _WaitingRecord:
    encoded: bytes
    confirmed: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
