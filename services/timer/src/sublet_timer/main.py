"""``sublet-timer``: wakes what sleeps, and tells the schedulers that time passes."""

from __future__ import annotations

from functools import cache

from sublet_platform.metrics import TimerMetrics
from sublet_platform.mongo.timers import MongoTimerStore
from sublet_platform.service import Service, run_service
from sublet_platform.settings import ServiceSettings
from sublet_timer.service import TimerService

_metrics = cache(TimerMetrics)
"""Once for a registry: a start that fails is tried again."""


async def start(service: Service) -> None:
    store = MongoTimerStore(service.mongo)
    await store.ensure_indexes()
    shell = TimerService(
        store=store,
        broker=service.broker,
        clock=service.clock,
        shards=service.shards,
        metrics=service.metrics,
        timer_metrics=_metrics(service.registry),
    )

    async def something_has_ended() -> str | None:
        return None if shell.alive else "one of its loops has ended"

    service.on_stop(shell.stop)
    await shell.start()
    service.health.add("timers", something_has_ended)


def main() -> None:
    run_service("timer", ServiceSettings(), start)
