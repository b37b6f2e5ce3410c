"""Polling and counting for the scenarios."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any, TypeVar

from demo_run import Check, DemoRun
from demo_workflows import sublet

from sublet import TaskRunSummary

T = TypeVar("T")

POLL_S = 0.1


async def poll_until(
    poll: Callable[[], Awaitable[T]], enough: Callable[[T], bool], demo: DemoRun, show: Callable[[T], str]
) -> T:
    """Poll until the result is enough, and show the progress."""
    while True:
        seen = await poll()
        demo.progress(show(seen))
        if enough(seen):
            return seen
        await asyncio.sleep(POLL_S)


async def await_with_progress(work: Coroutine[Any, Any, T], demo: DemoRun, show: Callable[[], str]) -> T:
    """Await the work, and show the progress meanwhile."""
    running = asyncio.create_task(work)
    try:
        while not running.done():
            demo.progress(show())
            await asyncio.wait([running], timeout=POLL_S)
        return running.result()
    finally:
        running.cancel()


async def tasks_of(run_id: str) -> dict[str, TaskRunSummary]:
    """The tasks of a run by name."""
    details = await sublet.runs.aio_get(run_id)
    return {task.display_name: task for task in details.tasks}


async def workers_of(run_ids: Sequence[str]) -> dict[str, str | None]:
    """The worker of the only task of each run; None if the task has none yet."""
    runs = await asyncio.gather(*(sublet.runs.aio_get(run_id) for run_id in run_ids))
    return {run_id: run.tasks[0].worker for run_id, run in zip(run_ids, runs, strict=True)}


def span_s(begin: datetime | None, end: datetime | None) -> float:
    assert begin is not None
    assert end is not None
    return (end - begin).total_seconds()


def most_concurrent(spans: Iterable[tuple[float, float]]) -> int:
    """The largest number of spans (begin, end) that overlap."""
    changes = sorted(change for begin, end in spans for change in ((begin, 1), (end, -1)))
    most = now = 0
    for _, change in changes:
        now += change
        most = max(most, now)
    return most


def slots_checks(demo: DemoRun, limits: Mapping[tuple[str, str], int]) -> list[Check]:
    """A check of the taken slots by (pool, kind), read from the metrics; none if the metrics are not exact."""
    if demo.gauges.polls == 0 or not demo.gauges.exact:
        return []
    most = {slot: demo.gauges.most_taken[slot] for slot in limits}
    figure = ", ".join(f"{most[pool, kind]} of {limit} {kind}" for (pool, kind), limit in limits.items())
    return [Check("most slots taken, by the metrics", figure, all(most[slot] <= limits[slot] for slot in limits))]
