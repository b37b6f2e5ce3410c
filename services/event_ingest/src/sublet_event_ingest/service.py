"""Event-ingest as it runs: one queue, batches, a sweep now and then, a stop in good order."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import replace

from sublet_event_ingest.ingest import Ingest
from sublet_event_ingest.metrics import IngestMetrics
from sublet_event_ingest.sweeper import SWEEP_INTERVAL_S, Sweeper
from sublet_platform.batching import BatchLoop
from sublet_platform.metrics import ServiceMetrics
from sublet_platform.ports import Broker, Clock, Consumer, Delivery, EventStore, RunStore, StoreUnavailable
from sublet_protocol import ids, limits
from sublet_protocol.topology import EVENTS, INGEST

logger = logging.getLogger(__name__)


class IngestService:
    def __init__(
        self,
        *,
        store: EventStore,
        runs: RunStore,
        broker: Broker,
        clock: Clock,
        new_id: Callable[[], str],
        metrics: ServiceMetrics,
        ingest_metrics: IngestMetrics,
        shards: int = ids.BUCKETS,
    ) -> None:
        ingest = Ingest(
            store=store,
            broker=broker,
            clock=clock,
            new_id=new_id,
            metrics=metrics,
            ingest_metrics=ingest_metrics,
            shards=shards,
        )
        self._broker = broker
        self._batches = BatchLoop(ingest.process, broker, metrics, name="ingest", on_failure=ingest.drop)
        self._consumer: Consumer | None = None
        self._sweeper = Sweeper(store, runs, metrics)
        self._sweeping: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Raises BrokerUnavailable."""
        self._batches.start()
        self._consumer = await self._broker.consume(INGEST, self._arrived, prefetch=limits.EVENT_PREFETCH)
        self._sweeping = asyncio.get_running_loop().create_task(self._sweep())

    def _arrived(self, delivery: Delivery) -> None:
        """Of an event that will be refused for its size, no more is kept than what shows it to be too large."""
        if delivery.exchange == EVENTS and len(delivery.body) > limits.PAYLOAD_MAX_BYTES:
            delivery = replace(delivery, body=delivery.body[: limits.PAYLOAD_MAX_BYTES + 1])
        self._batches.handle(delivery)

    async def stop(self) -> None:
        """Finish what is in hand: an event without message id that came again would be another event."""
        if self._sweeping is not None:
            self._sweeping.cancel()
            await asyncio.gather(self._sweeping, return_exceptions=True)
        await self._batches.rest()
        if self._consumer is not None:
            await self._consumer.close()
        await self._batches.stop()

    @property
    def alive(self) -> bool:
        return self._batches.alive

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_INTERVAL_S)
            try:
                await self._sweeper.sweep()
            except StoreUnavailable as error:
                logger.warning("subscriptions are not swept, trying again in %g s: %s", SWEEP_INTERVAL_S, error)
            except Exception:
                logger.exception("subscriptions are not swept, trying again in %g s", SWEEP_INTERVAL_S)
