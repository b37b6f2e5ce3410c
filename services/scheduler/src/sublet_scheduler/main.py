"""``sublet-scheduler``: decides which task is ready, who gets the lease, and what a report changes."""

from __future__ import annotations

from sublet_platform.mongo.runs import MongoRunStore
from sublet_platform.service import Service, run_service
from sublet_platform.settings import ServiceSettings
from sublet_scheduler.metrics import SchedulerMetrics
from sublet_scheduler.scheduler import Scheduler


async def start(service: Service, scheduler_metrics: SchedulerMetrics) -> None:
    store = MongoRunStore(service.mongo, service.clock)
    await store.ensure_indexes()
    scheduler = Scheduler(
        scheduler_id=service.new_id(),
        shards=service.shards,
        store=store,
        broker=service.broker,
        clock=service.clock,
        new_id=service.new_id,
        metrics=service.metrics,
        scheduler_metrics=scheduler_metrics,
    )
    service.on_stop(scheduler.stop)
    service.health.tell("shards_held", scheduler.shards_held)
    await scheduler.start()


def main() -> None:
    run_service("scheduler", ServiceSettings(), start, SchedulerMetrics)
