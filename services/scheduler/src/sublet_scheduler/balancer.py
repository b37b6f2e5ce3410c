"""Distributes the shards evenly over the live schedulers.

Every scheduler consumes the queue of every shard, and RabbitMQ serves one of them (single active consumer). So a shard
whose scheduler dies moves within milliseconds. A scheduler that holds more than its share becomes the last standby of
one shard at a time. Correctness does not depend on the distribution: the revisions of the runs ensure it.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Sequence
from typing import Protocol

from sublet_platform.ports import BrokerUnavailable, Clock, RunStore, StoreUnavailable

logger = logging.getLogger(__name__)

REBALANCE_INTERVAL_S = 2.0
"""The interval at which a scheduler stores a heartbeat and checks its share."""
SILENT_S = 7.0
"""A scheduler without a heartbeat for this long is not counted."""


class ShardConsumer(Protocol):
    """This process as a consumer of one shard."""

    def active(self) -> bool: ...

    async def join(self) -> None:
        """Consume the queue of the shard, if it is not consumed. Raises BrokerUnavailable."""

    async def yield_shard(self) -> None:
        """Make the next standby the active consumer. Raises BrokerUnavailable; then the queue is not consumed."""


class ShardBalancer:
    def __init__(self, scheduler: str, consumers: Sequence[ShardConsumer], *, store: RunStore, clock: Clock) -> None:
        self._scheduler, self._consumers, self._store, self._clock = scheduler, consumers, store, clock

    async def run(self) -> None:
        """Rebalance periodically until cancelled."""
        while True:
            try:
                await self._rebalance()
            except StoreUnavailable:
                logger.warning("cannot rebalance: the database does not answer")
            except BrokerUnavailable as error:
                logger.warning("cannot consume the queue of a shard; retrying: %s", error)
            await asyncio.sleep(REBALANCE_INTERVAL_S)

    async def _rebalance(self) -> None:
        for consumer in self._consumers:
            await consumer.join()
        heartbeats = await self._store.beat(self._scheduler, self._clock.now())
        live = [name for name, at in heartbeats.items() if self._clock.now() - at <= SILENT_S]
        mine = [consumer for consumer in self._consumers if consumer.active()]
        share = math.ceil(len(self._consumers) / max(1, len(live)))
        if len(mine) > share:
            logger.info(
                "rebalancing: holds %d shards, fair share among %d schedulers is %d; releasing one",
                len(mine),
                len(live),
                share,
            )
            await mine[-1].yield_shard()
