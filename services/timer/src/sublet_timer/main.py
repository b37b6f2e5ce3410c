"""``sublet-timer``: fires the timers of sleeping tasks, and sends the schedulers a tick each second."""

from __future__ import annotations

from sublet_platform.mongo.timers import MongoTimerStore
from sublet_platform.service import Service, run_service
from sublet_platform.settings import ServiceSettings
from sublet_timer.metrics import TimerMetrics
from sublet_timer.service import TimerService


async def start(service: Service, timer_metrics: TimerMetrics) -> None:
    store = MongoTimerStore(service.mongo)
    await store.ensure_indexes()
    timer = TimerService(
        store=store,
        broker=service.broker,
        clock=service.clock,
        shards=service.shards,
        metrics=service.metrics,
        timer_metrics=timer_metrics,
    )

    async def check_background_tasks() -> str | None:
        return None if timer.alive else "a background task has ended"

    service.on_stop(timer.stop)
    await timer.start()
    service.health.add("timers", check_background_tasks)


def main() -> None:
    run_service("timer", ServiceSettings(), start, TimerMetrics)
