"""How scenes look at what goes on, and count."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any, TypeVar

from demo_workflows import sublet
from stage import Fact, Stage

from sublet._client.read_models import TaskRunSummary

T = TypeVar("T")

POLL_S = 0.1


async def until(
    look: Callable[[], Awaitable[T]], enough: Callable[[T], bool], stage: Stage, show: Callable[[T], str]
) -> T:
    """Look until it is enough, and show how far it is."""
    while True:
        seen = await look()
        stage.progress(show(seen))
        if enough(seen):
            return seen
        await asyncio.sleep(POLL_S)


async def watched(work: Coroutine[Any, Any, T], stage: Stage, show: Callable[[], str]) -> T:
    """Do the work, and show how far it is."""
    running = asyncio.create_task(work)
    try:
        while not running.done():
            stage.progress(show())
            await asyncio.wait([running], timeout=POLL_S)
        return running.result()
    finally:
        running.cancel()


async def tasks_of(run_id: str) -> dict[str, TaskRunSummary]:
    """The tasks of a run by name."""
    details = await sublet.runs.aio_get(run_id)
    return {task.display_name: task for task in details.tasks}


async def workers_of(run_ids: Sequence[str]) -> dict[str, str | None]:
    """Which worker has the only task of each run; None if it has none."""
    runs = await asyncio.gather(*(sublet.runs.aio_get(run_id) for run_id in run_ids))
    return {run_id: run.tasks[0].worker for run_id, run in zip(run_ids, runs, strict=True)}


def span_s(begin: datetime | None, end: datetime | None) -> float:
    assert begin is not None
    assert end is not None
    return (end - begin).total_seconds()


def most_at_once(spans: Iterable[tuple[float, float]]) -> int:
    """How many of these (begin, end) overlap at most."""
    changes = sorted(change for begin, end in spans for change in ((begin, 1), (end, -1)))
    most = now = 0
    for _, change in changes:
        now += change
        most = max(most, now)
    return most


def within_slots(stage: Stage, limits: Mapping[tuple[str, str], int]) -> list[Fact]:
    """What the metrics say of taken slots by (pool, kind); nothing if they cannot be relied on."""
    if stage.gauges.looks == 0 or not stage.gauges.exact:
        return []
    most = {slot: stage.gauges.most_taken[slot] for slot in limits}
    figure = ", ".join(f"{most[pool, kind]} of {limit} {kind}" for (pool, kind), limit in limits.items())
    return [Fact("most slots taken, by the metrics", figure, all(most[slot] <= limits[slot] for slot in limits))]
