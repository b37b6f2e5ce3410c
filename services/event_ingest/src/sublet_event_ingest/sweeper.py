"""Looks for subscriptions that nobody waits for any more, and takes them away.

An event-ingest that was replaced may still write what it had in hand: a subscription that its successor has ended
meanwhile. It wakes nobody, but it would stay, and be looked at with every event of its key.

A subscription is written after the run that asks for it, and never under the same id again. So a run that is read
after it, from the primary as well, either still waits, or never will: whoever finds out may take the subscription away,
at any time.
"""

from __future__ import annotations

import logging

from sublet_engine.run.transitions import is_waiting_for
from sublet_platform.metrics import ServiceMetrics
from sublet_platform.ports import EventStore, RunStore, StoredSubscription
from sublet_protocol import ids

logger = logging.getLogger(__name__)

SWEEP_INTERVAL_S = 60.0
"""Leftovers are rare and harm nobody: there is no hurry."""

SWEEP_PAGE = 200
"""Subscriptions looked at in one sweep, with what the runs that asked for them wait for: one query each."""


class Sweeper:
    """Walks through all subscriptions in the order of their ids, a page at a time, and begins again at the end."""

    def __init__(self, events: EventStore, runs: RunStore, metrics: ServiceMetrics) -> None:
        self._events, self._runs, self._metrics = events, runs, metrics
        self._after = ""
        self._suspects: frozenset[str] = frozenset()

    async def sweep(self) -> None:
        """Look at the next page. What nobody waits for is looked at once more the next time before it is taken away:
        most often it is about to go by itself, and no leftover. Raises StoreUnavailable."""
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
        logger.warning("subscriptions that nobody waits for: %s", left[:10], extra={"count": len(left)})

    async def _unawaited(self, page: list[StoredSubscription]) -> frozenset[str]:
        runs = await self._runs.load_waits(sorted({ids.run_of(each.subscribe.task_run_id) for each in page}))
        tasks = {ids.task_run_id(run_id, task.name): task for run_id, tasks in runs.items() for task in tasks}
        return frozenset(
            each.id for each in page if not is_waiting_for(tasks.get(each.subscribe.task_run_id), each.subscribe)
        )
