"""Reports to the schedulers: in order for each routing key, repeated until the broker has confirmed them."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any

from sublet._amqp.transport import Transport
from sublet._errors import TransportUnavailable
from sublet_protocol import limits
from sublet_protocol.chunking import Chunk
from sublet_protocol.messages import Operation, Record, encode_one
from sublet_protocol.topology import REQUESTS

RETRY_PAUSE_S = 1.0
"""Between attempts to publish, on top of the time that the transport itself waits for a connection."""

_log = logging.getLogger(__name__)

_Lane = deque[tuple[bytes, asyncio.Future[None]]]


class Reports:
    """While a message is under way to a routing key, further reports for it gather into the next one."""

    def __init__(self, transport: Transport, spawn: Callable[[Coroutine[Any, Any, None]], object]) -> None:
        self._transport = transport
        self._spawn = spawn
        self._lanes: dict[str, _Lane] = {}

    @property
    def idle(self) -> bool:
        """Everything is confirmed."""
        return not self._lanes

    def add(self, routing_key: str, report: Record) -> asyncio.Future[None]:
        """Send it. The future ends with the broker's confirm, and never fails."""
        confirmed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        lane = self._lanes.get(routing_key)
        if lane is None:
            lane = self._lanes[routing_key] = deque()
            self._spawn(self._drive(routing_key, lane))
        lane.append((encode_one(report), confirmed))
        return confirmed

    async def _drive(self, routing_key: str, lane: _Lane) -> None:
        while lane:
            chunk, futures = _next_chunk(lane)
            await self._publish(routing_key, chunk.body())
            for confirmed in futures:
                if not confirmed.done():
                    confirmed.set_result(None)
        del self._lanes[routing_key]

    async def _publish(self, routing_key: str, body: bytes) -> None:
        while True:
            try:
                await self._transport.publish(REQUESTS, routing_key, body)
                return
            except TransportUnavailable as error:
                _log.warning("reports to %s are not confirmed, sending them again: %s", routing_key, error)
            except Exception:
                _log.exception("reports to %s cannot be sent, trying again", routing_key)
            await asyncio.sleep(RETRY_PAUSE_S)


def chunked(operations: tuple[Operation, ...]) -> list[tuple[Operation, ...]]:
    """Operations for as many reports as they need, in order; at least one portion, which may be empty."""
    portions: list[list[Operation]] = [[]]
    size = 0
    for operation in operations:
        weight = len(operation.result) + (len(operation.child.input) if operation.child is not None else 0)
        if portions[-1] and size + weight > limits.REPORT_MAX_BYTES:
            portions.append([])
            size = 0
        portions[-1].append(operation)
        size += weight
    return [tuple(portion) for portion in portions]


def _next_chunk(lane: _Lane) -> tuple[Chunk, list[asyncio.Future[None]]]:
    """As much as one message may hold; at least one report."""
    chunk, futures = Chunk(), []
    while lane and chunk.has_room_for(lane[0][0]):
        report, confirmed = lane.popleft()
        chunk.add(report)
        futures.append(confirmed)
    return chunk, futures
