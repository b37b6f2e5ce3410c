"""The event-ingest service: it consumes its queue in batches, and sweeps the subscriptions periodically."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import replace

from sublet_event_ingest.ingest import Ingest
from sublet_event_ingest.metrics import IngestMetrics
from sublet_event_ingest.sweeper import SUBSCRIPTION_SWEEP_INTERVAL_S, Sweeper
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
        self._consumer = await self._broker.consume(INGEST, self._on_delivery, prefetch=limits.EVENT_PREFETCH)
        self._sweeping = asyncio.get_running_loop().create_task(self._sweep())

    def _on_delivery(self, delivery: Delivery) -> None:
        """Accept a delivery. The body of an event that is too large is cut, and refused later."""
        if delivery.exchange == EVENTS and len(delivery.body) > limits.PAYLOAD_MAX_BYTES:
            delivery = replace(delivery, body=delivery.body[: limits.PAYLOAD_MAX_BYTES + 1])
        self._batches.handle(delivery)

    async def stop(self) -> None:
        """Finish all deliveries that have arrived. A redelivered event without message id would be another event."""
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
            await asyncio.sleep(SUBSCRIPTION_SWEEP_INTERVAL_S)
            try:
                await self._sweeper.sweep()
            except StoreUnavailable as error:
                logger.warning(
                    "cannot sweep the subscriptions; retrying in %g s: %s", SUBSCRIPTION_SWEEP_INTERVAL_S, error
                )
            except Exception:
                logger.exception("cannot sweep the subscriptions; retrying in %g s", SUBSCRIPTION_SWEEP_INTERVAL_S)
