"""Shares the shards out evenly over the schedulers that are up.

Every scheduler consumes every shard's queue, and RabbitMQ gives each queue to one of them (single active consumer): so
a shard whose scheduler dies moves within milliseconds. Who holds more than its share steps back to the end of the line
for one shard at a time. Correctness never depends on it: the revisions of the runs do that.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Sequence
from typing import Protocol

from sublet_platform.ports import BrokerUnavailable, Clock, RunStore, StoreUnavailable

logger = logging.getLogger(__name__)

HEARTBEAT_INTERVAL_S = 2.0
"""How often a scheduler says that it lives and looks at its share."""
SILENT_S = 7.0
"""A scheduler not heard of for this long does not count: three beats missed."""


class ShardConsumer(Protocol):
    """A shard as this process takes part in it."""

    def active(self) -> bool: ...

    async def join(self) -> None:
        """Join the line, if it is not there. Raises BrokerUnavailable."""

    async def yield_shard(self) -> None:
        """Let the next consumer in line have it. Raises BrokerUnavailable: then it has left the line."""


class ShardBalancer:
    def __init__(self, scheduler: str, consumers: Sequence[ShardConsumer], *, store: RunStore, clock: Clock) -> None:
        self._scheduler, self._consumers, self._store, self._clock = scheduler, consumers, store, clock

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            try:
                await self._rebalance()
            except StoreUnavailable:
                logger.warning("cannot see the other schedulers: the database does not answer")
            except BrokerUnavailable as error:
                logger.warning("cannot join the line for a shard, will try again: %s", error)
            await asyncio.sleep(HEARTBEAT_INTERVAL_S)

    async def _rebalance(self) -> None:
        for consumer in self._consumers:
            await consumer.join()
        heard = await self._store.beat(self._scheduler, self._clock.now())
        live = [name for name, at in heard.items() if self._clock.now() - at <= SILENT_S]
        mine = [consumer for consumer in self._consumers if consumer.active()]
        share = math.ceil(len(self._consumers) / max(1, len(live)))
        if len(mine) > share:
            logger.info("holding %d shards, a share among %d schedulers is %d: giving one", len(mine), len(live), share)
            await mine[-1].yield_shard()
