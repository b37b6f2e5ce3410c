"""One or more event-ingest processes on ports in memory, and the messages that arrive at the shards."""

from __future__ import annotations

import asyncio
import itertools
import json
from typing import Any

from sublet_event_ingest.metrics import IngestMetrics
from sublet_event_ingest.service import IngestService
from sublet_platform.memory import MemoryBroker, MemoryCluster, MemoryDatabase, MemoryEventStore, MemoryRunStore
from sublet_platform.metrics import ServiceMetrics, new_registry
from sublet_platform.ports import Delivery, Outgoing
from sublet_protocol import ids
from sublet_protocol.messages import (
    EventMatched,
    Record,
    RegisterTriggers,
    RunRequest,
    Subscribe,
    decode_for_shard,
    encode,
)
from sublet_protocol.specs import EventCondition
from sublet_protocol.topology import DEAD, EVENTS, INGEST, shard_queue, topology
from support.virtual_time import EPOCH_S, VirtualClock

SHARDS = 2


class Instance:
    """One event-ingest process: its connection, metrics and service."""

    def __init__(self, harness: IngestHarness, skew_s: float = 0.0) -> None:
        self.broker = MemoryBroker(harness.cluster)
        self.metrics = ServiceMetrics(new_registry())
        clock = VirtualClock(skew_s)
        self.service = IngestService(
            store=MemoryEventStore(harness.database),
            runs=MemoryRunStore(harness.database, clock),
            broker=self.broker,
            clock=clock,
            new_id=harness.new_id,
            metrics=self.metrics,
            ingest_metrics=IngestMetrics(self.metrics),
        )

    async def stop(self) -> None:
        await self.service.stop()
        await self.broker.close()

    def value(self, metric: str, **labels: str) -> float | None:
        return self.metrics.registry.get_sample_value(metric, labels)


async def _slow(operation: str) -> None:
    await asyncio.sleep(0.5)


class IngestHarness:
    """A broker, a database, and the messages that arrive at the shards."""

    def __init__(self) -> None:
        self.cluster = MemoryCluster()
        self.cluster.declare(topology(SHARDS))
        self.database = MemoryDatabase()
        self.user = MemoryBroker(self.cluster)
        self.matched: list[EventMatched] = []
        self.runs: list[RunRequest] = []
        self.dead: list[Delivery] = []
        numbers = itertools.count()
        self.new_id = lambda: f"minted-{next(numbers)}"

    @classmethod
    async def begin(cls, instances: int = 1, skew_s: float = 0.0) -> tuple[IngestHarness, list[Instance]]:
        harness = cls()
        for shard in range(SHARDS):
            await harness.user.consume(shard_queue(shard), harness._receiver(shard), prefetch=1_000)
        await harness.user.consume(DEAD, harness._dead_letter, prefetch=10)
        started = [Instance(harness, skew_s) for _ in range(instances)]
        for instance in started:
            await instance.service.start()
        return harness, started

    def _receiver(self, shard: int):  # type: ignore[no-untyped-def]
        def receive(delivery: Delivery) -> None:
            for message in decode_for_shard(delivery.body):
                assert isinstance(message, EventMatched | RunRequest)
                run = ids.run_of(message.task_run_id) if isinstance(message, EventMatched) else message.run_id
                assert ids.bucket_of(run) in ids.buckets_of_shard(shard, SHARDS)
                (self.matched if isinstance(message, EventMatched) else self.runs).append(message)  # type: ignore[arg-type]
            self.user.ack([delivery])

        return receive

    def _dead_letter(self, delivery: Delivery) -> None:
        self.dead.append(delivery)
        self.user.ack([delivery])

    async def publish(
        self, payload: dict[str, Any] | None = None, key: str = "paid", message_id: str | None = None, **headers: object
    ) -> None:
        body = json.dumps(payload or {}).encode()
        await self.user.publish([Outgoing(EVENTS, key, body, message_id=message_id, headers=headers)])

    async def publish_together(self, *messages: Outgoing) -> None:
        """Publish the messages during another batch, so that they form the next batch."""
        other = Outgoing("", INGEST, encode([RegisterTriggers("none", ())]))
        before = self.database.before
        self.database.before = _slow
        await self.user.publish([other])
        await self.user.publish(messages)
        await asyncio.sleep(0.1)
        self.database.before = before
        await asyncio.sleep(1)

    async def command(self, *messages: Record) -> None:
        await self.user.publish([Outgoing("", INGEST, encode(messages))])

    @property
    def woken(self) -> dict[str, Any]:
        """The payload of the first match of each task run."""
        told: dict[str, Any] = {}
        for message in self.matched:
            told.setdefault(message.task_run_id, json.loads(bytes(message.payload)))
        return told


def wait(
    name: str, expression: str | None = None, *, since_s: float = 0.0, key: str = "paid", **condition: Any
) -> Subscribe:
    on = EventCondition(key="c", event_key=key, expression=expression, **condition)
    return Subscribe(f"wait-{name}", f"{name}.t", "1", on, int((EPOCH_S + since_s) * 1_000_000) - 1)


async def settled(*instances: Instance, seconds: float = 5.0) -> None:
    await asyncio.sleep(seconds)
    for instance in instances:
        await instance.stop()
