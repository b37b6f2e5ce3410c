"""Load: runs of a DAG with a durable task in the middle, which sleeps, has a child, and sleeps again."""

from __future__ import annotations

import asyncio
from typing import Any

from acceptance.environment import Lab


async def sail(lab: Lab, count: int, first: int = 0) -> dict[int, Any]:
    """That many voyages under way, by their numbers."""
    voyage = lab.workflows.voyage
    numbers = range(first, first + count)
    items = [voyage.create_bulk_run_item(lab.workflows.Number(n=n)) for n in numbers]
    return dict(zip(numbers, await voyage.aio_run_many(items, wait_for_result=False), strict=True))


async def everybody_lands(lab: Lab, runs: dict[int, Any]) -> None:
    """All of them, with the right results, and none of their tasks done twice: nobody but servers and services died."""
    await everybody_arrives(runs)
    for what in ("embarked", "sailed", "landed"):
        assert sorted(lab.ledger.values(what, "n")) == sorted(runs), f"everybody {what} once"


async def everybody_arrives(runs: dict[int, Any]) -> None:
    """All of them, with the right results."""
    results = await asyncio.gather(*(run.aio_result() for run in runs.values()))
    assert [result["land"] for result in results] == [{"n": 2 * n} for n in runs]
