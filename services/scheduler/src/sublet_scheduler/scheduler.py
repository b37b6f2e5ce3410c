"""A scheduler process: consumers of all shards, answers to queries, and the balancer."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from sublet_platform.batching import BatchLoop
from sublet_platform.dead_letters import dead_letter
from sublet_platform.metrics import ServiceMetrics
from sublet_platform.ports import Broker, Clock, Delivery, RunStore
from sublet_protocol.topology import QUERIES, scheduler_inbox
from sublet_scheduler.balancer import ShardBalancer
from sublet_scheduler.metrics import SchedulerMetrics
from sublet_scheduler.queries import Queries
from sublet_scheduler.shard_consumer import ShardConsumer
from sublet_scheduler.shard_service import ShardService

logger = logging.getLogger(__name__)

QUERY_PREFETCH = 50


class Scheduler:
    """``scheduler_id`` names the process; ``shards`` is fixed for the life of a deployment."""

    def __init__(
        self,
        *,
        scheduler_id: str,
        shards: int,
        store: RunStore,
        broker: Broker,
        clock: Clock,
        new_id: Callable[[], str],
        metrics: ServiceMetrics,
        scheduler_metrics: SchedulerMetrics,
    ) -> None:
        self._broker, self._metrics = broker, metrics
        self._consumers = [
            ShardConsumer(
                ShardService(
                    index,
                    shards,
                    store=store,
                    broker=broker,
                    clock=clock,
                    new_id=new_id,
                    metrics=scheduler_metrics,
                    refuse=self._refuse,
                ),
                scheduler_inbox(scheduler_id, index),
                broker,
                metrics,
            )
            for index in range(shards)
        ]
        queries = Queries(store=store, broker=broker, clock=clock, refuse=self._refuse)
        self._queries = BatchLoop(queries.process, broker, metrics, name="queries")
        self._balancer = ShardBalancer(scheduler_id, self._consumers, store=store, clock=clock)
        self._balancer_task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Become a standby of every shard, and answer queries."""
        for consumer in self._consumers:
            await consumer.start()
        self._queries.start()
        await self._broker.consume(QUERIES, self._queries.handle, prefetch=QUERY_PREFETCH)
        self._balancer_task = asyncio.create_task(self._balancer.run())

    async def stop(self) -> None:
        """Finish the current batches and stop consuming. The caller closes the broker."""
        if self._balancer_task is not None:
            self._balancer_task.cancel()
        for consumer in self._consumers:
            await consumer.stop()
        await self._queries.stop()

    def shards_held(self) -> list[int]:
        """The shards that this process owns now."""
        return [consumer.service.index for consumer in self._consumers if consumer.active()]

    async def _refuse(self, delivery: Delivery, reason: str) -> None:
        logger.warning("dead-lettering a message with routing key %s: %s", delivery.routing_key, reason)
        await dead_letter(self._broker, delivery, reason, self._metrics, "shard")
