"""``sublet-event-ingest``: stores events, and matches them with waits and triggers."""

from __future__ import annotations

from functools import cache

from sublet_event_ingest.service import IngestService
from sublet_platform.metrics import IngestMetrics
from sublet_platform.mongo.events import MongoEventStore
from sublet_platform.mongo.runs import MongoRunStore
from sublet_platform.service import Service, run_service
from sublet_platform.settings import ServiceSettings

_metrics = cache(IngestMetrics)
"""Once for a registry: a start that fails is tried again."""


async def start(service: Service) -> None:
    store = MongoEventStore(service.mongo)
    await store.ensure_indexes()
    shell = IngestService(
        store=store,
        runs=MongoRunStore(service.mongo, service.clock),
        broker=service.broker,
        clock=service.clock,
        new_id=service.new_id,
        metrics=service.metrics,
        ingest_metrics=_metrics(service.registry),
        shards=service.shards,
    )

    async def batches_have_ended() -> str | None:
        return None if shell.alive else "the batch loop has ended"

    service.on_stop(shell.stop)
    await shell.start()
    service.health.add("batches", batches_have_ended)


def main() -> None:
    run_service("event-ingest", ServiceSettings(), start)
