"""The floor: the broker and database operations that a piece of work needs at least, through the same drivers.

A run of one task needs a confirmed request, a document, a grant, an update of the document, a confirmed report, another
update, and a result. The floor does only these, in batches, without any decision.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from dataclasses import dataclass

from sublet_platform.mongo.client import Document, Mongo, Update, connect
from sublet_platform.ports import Delivery, Outgoing
from sublet_platform.rabbit.broker import Rabbit, declare
from sublet_protocol.topology import Queue, Topology, service_queue

BODY = b'{"t":"run_request","run_id":"0b7ccd36-6f2b-4f80-9b6c-2d4f3f3f8a01","workflow":"bench","input":{"n":1}}'
CONFIRMED, UNCONFIRMED = "sublet-floor.confirmed", "sublet-floor.unconfirmed"


@dataclass(frozen=True)
class Steps:
    """The operations of one piece of work. ``confirmed`` and ``unconfirmed``: messages by their kind of publish;
    ``inserts`` and ``updates``: documents written with majority and journal; ``reads``: queries."""

    confirmed: int
    unconfirmed: int
    inserts: int
    updates: int
    reads: int = 0


STEPS = {
    "noop": Steps(confirmed=2, unconfirmed=2, inserts=1, updates=2),
    "chain": Steps(confirmed=4, unconfirmed=4, inserts=1, updates=4),
    "event": Steps(confirmed=3, unconfirmed=1, inserts=2, updates=2, reads=1),
    "sleeper": Steps(confirmed=2, unconfirmed=1, inserts=1, updates=2, reads=1),
    "fan-out": Steps(confirmed=3, unconfirmed=1, inserts=2, updates=3),
}


class Floor:
    def __init__(self, amqp_url: str, mongo_url: str) -> None:
        self._rabbit = Rabbit(amqp_url, name="floor")
        self._mongo: Mongo = connect(mongo_url, f"sublet_floor_{uuid.uuid4().hex[:8]}")
        self._amqp_url = amqp_url
        self._arrived = asyncio.Semaphore(0)
        self._deliveries: list[Delivery] = []

    async def __aenter__(self) -> Floor:
        await declare(self._amqp_url, Topology((), (service_queue(CONFIRMED), Queue(UNCONFIRMED)), ()))
        await self._rabbit.open()
        for queue in (CONFIRMED, UNCONFIRMED):
            await self._rabbit.consume(queue, self._take, prefetch=2_000)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._mongo.drop_database()
        await self._rabbit.close()
        self._mongo.close()

    def _take(self, delivery: Delivery) -> None:
        self._deliveries.append(delivery)
        self._arrived.release()

    async def one(self, steps: Steps, count: int) -> float:
        """Seconds for ``count`` pieces of work as one batch, step after step."""
        began = time.perf_counter()
        names: list[str] = []
        for _ in range(steps.inserts):
            names = [uuid.uuid4().hex for _ in range(count)]
            documents: list[Document] = [{"_id": name, "input": BODY.decode(), "revision": 1} for name in names]
            await self._mongo.write("runs", inserts=documents)
        for revision in range(steps.updates):
            updates = [Update(name, revision + 1, {"status": "RUNNING", "revision": revision + 2}) for name in names]
            await self._mongo.write("runs", updates=updates)
        for _ in range(steps.reads):
            await self._mongo.find("runs", {"_id": {"$in": names}})
        for _ in range(steps.confirmed):
            await self._send(CONFIRMED, count, persistent=True)
        for _ in range(steps.unconfirmed):
            await self._send(UNCONFIRMED, count, persistent=False)
        return time.perf_counter() - began

    async def _send(self, queue: str, count: int, *, persistent: bool) -> None:
        """Publish one message with ``count`` bodies, and wait until it has been consumed and acknowledged."""
        message = Outgoing("", queue, b"[" + b",".join([BODY] * count) + b"]", persistent=persistent)
        await self._rabbit.publish([message])
        await self._arrived.acquire()
        self._rabbit.ack(self._deliveries)
        self._deliveries.clear()


async def rate_and_latency(amqp_url: str, mongo_url: str, name: str, *, batch: int = 100) -> dict[str, float]:
    """Throughput per second in batches, and the median latency of single pieces."""
    steps = STEPS[name]
    async with Floor(amqp_url, mongo_url) as floor:
        await floor.one(steps, batch)
        in_batches = [await floor.one(steps, batch) for _ in range(10)]
        singly = [await floor.one(steps, 1) for _ in range(30)]
    return {"floor_per_s": batch / median(in_batches), "floor_p50_ms": median(singly) * 1e3}


def median(values: list[float]) -> float:
    return percentile(values, 50)


def percentile(values: list[float], percent: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, round(percent / 100 * (len(ordered) - 1)))]
