"""``sublet-event-ingest``: stores events, and matches them with waits and triggers."""

from __future__ import annotations

from sublet_event_ingest.metrics import IngestMetrics
from sublet_event_ingest.service import IngestService
from sublet_platform.mongo.events import MongoEventStore
from sublet_platform.mongo.runs import MongoRunStore
from sublet_platform.service import Service, run_service
from sublet_platform.settings import ServiceSettings


async def start(service: Service, ingest_metrics: IngestMetrics) -> None:
    store = MongoEventStore(service.mongo)
    await store.ensure_indexes()
    ingest = IngestService(
        store=store,
        # Read only: the sweeper compares the subscriptions with the open waits of their runs.
        runs=MongoRunStore(service.mongo, service.clock),
        broker=service.broker,
        clock=service.clock,
        new_id=service.new_id,
        metrics=service.metrics,
        ingest_metrics=ingest_metrics,
        shards=service.shards,
    )

    async def check_batch_loop() -> str | None:
        return None if ingest.alive else "the batch loop has ended"

    service.on_stop(ingest.stop)
    await ingest.start()
    service.health.add("batches", check_batch_loop)


def main() -> None:
    run_service("event-ingest", ServiceSettings(), start, IngestMetrics)
