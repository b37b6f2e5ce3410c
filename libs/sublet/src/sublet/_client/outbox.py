"""Gathers what many callers send to one place at the same time into few messages."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Iterable

from sublet_protocol.chunking import Chunk

Publish = Callable[[str, bytes], Awaitable[None]]
"""Publishes a body to a routing key, confirmed."""


class Outbox:
    """Sends at once where nothing is under way; while something is, what comes gathers for the next message.

    A body is a JSON array of at most `limits.BATCH_MAX_ITEMS` records and about `limits.BATCH_MAX_BYTES`.
    """

    def __init__(self, publish: Publish) -> None:
        self._publish = publish
        self._waiting: dict[str, deque[_Parcel]] = {}
        """Of the keys to which something is under way."""
        self._drivers: set[asyncio.Task[None]] = set()

    async def send(self, routing_key: str, records: Iterable[bytes]) -> None:
        """Returns when all are confirmed; raises what `Publish` raised for one of them."""
        parcels = [_Parcel(record) for record in records]
        lane = self._waiting.get(routing_key)
        if lane is None:
            lane = self._waiting[routing_key] = deque(parcels)
            driver = asyncio.create_task(self._drive(routing_key, lane))
            self._drivers.add(driver)
            driver.add_done_callback(self._drivers.discard)
        else:
            lane.extend(parcels)
        if len(parcels) == 1:
            await parcels[0].sent
        else:
            await asyncio.gather(*(parcel.sent for parcel in parcels))

    async def _drive(self, routing_key: str, lane: deque[_Parcel]) -> None:
        try:
            while True:
                chunk, parcels = _next_chunk(lane)
                if not parcels:
                    return
                await self._deliver(routing_key, chunk.body(), parcels)
        finally:
            del self._waiting[routing_key]

    async def _deliver(self, routing_key: str, body: bytes, parcels: list[_Parcel]) -> None:
        try:
            await self._publish(routing_key, body)
        except Exception as error:
            for parcel in parcels:
                if not parcel.sent.done():
                    parcel.sent.set_exception(error)
        else:
            for parcel in parcels:
                if not parcel.sent.done():
                    parcel.sent.set_result(None)


class _Parcel:
    __slots__ = ("record", "sent")

    def __init__(self, record: bytes) -> None:
        self.record = record
        self.sent: asyncio.Future[None] = asyncio.get_running_loop().create_future()


def _next_chunk(lane: deque[_Parcel]) -> tuple[Chunk, list[_Parcel]]:
    """As much as one message may hold, without what nobody waits for any more."""
    chunk, parcels = Chunk(), []
    while lane:
        if lane[0].sent.cancelled():
            lane.popleft()
        elif chunk.has_room_for(lane[0].record):
            parcels.append(lane.popleft())
            chunk.add(parcels[-1].record)
        else:
            break
    return chunk, parcels
