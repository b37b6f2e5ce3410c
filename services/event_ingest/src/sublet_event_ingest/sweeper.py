"""Removes subscriptions that no task waits for any more.

An instance of event-ingest that was replaced may still write a subscription that its successor has deleted meanwhile.
The subscription wakes no task, but it would be read with every event of its key.

A subscription is written after the run that requested it, and never again under the same id. So if a run, read from
the primary after the subscription, does not wait for it, it never will: any instance may remove it at any time.
"""

from __future__ import annotations

import logging

from sublet_engine.run.transitions import is_waiting_for
from sublet_platform.metrics import ServiceMetrics
from sublet_platform.ports import EventStore, RunStore, StoredSubscription
from sublet_protocol import ids

logger = logging.getLogger(__name__)

SUBSCRIPTION_SWEEP_INTERVAL_S = 60.0
"""Leftover subscriptions are rare and harmless, so the interval is long."""

SWEEP_PAGE = 200
"""Subscriptions in one sweep. It takes one query for them, and one for the open waits of their runs."""


class Sweeper:
    """Checks all subscriptions in the order of their ids, a page at each sweep, and restarts at the end."""

    def __init__(self, events: EventStore, runs: RunStore, metrics: ServiceMetrics) -> None:
        self._events, self._runs, self._metrics = events, runs, metrics
        self._after = ""
        self._suspects: frozenset[str] = frozenset()

    async def sweep(self) -> None:
        """Check the next page. A subscription without a wait is removed only if the next sweep finds it again: usually
        its removal is in progress. Raises StoreUnavailable."""
        page = await self._events.subscriptions_after(self._after, SWEEP_PAGE)
        begin, self._after = self._after, page[-1].id if len(page) == SWEEP_PAGE else ""
        suspects, self._suspects = self._suspects, frozenset()
        unawaited = await self._unawaited(page)
        if unawaited and not suspects:
            self._suspects, self._after = unawaited, begin
        elif unawaited & suspects:
            await self._remove(sorted(unawaited & suspects))

    async def _remove(self, left: list[str]) -> None:
        await self._events.change_subscriptions([], left)
        self._metrics.count_anomalies("subscriptions", len(left))
        logger.warning("removed subscriptions that no task waits for: %s", left[:10], extra={"count": len(left)})

    async def _unawaited(self, page: list[StoredSubscription]) -> frozenset[str]:
        runs = await self._runs.load_waits(sorted({ids.run_of(each.subscribe.task_run_id) for each in page}))
        tasks = {ids.task_run_id(run_id, task.name): task for run_id, tasks in runs.items() for task in tasks}
        return frozenset(
            each.id for each in page if not is_waiting_for(tasks.get(each.subscribe.task_run_id), each.subscribe)
        )
