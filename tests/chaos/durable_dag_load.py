"""Load: runs of a DAG with a durable task in the middle, which sleeps, has a child, and sleeps again."""

from __future__ import annotations

import asyncio
from typing import Any

from acceptance.environment import Environment


async def start_runs(environment: Environment, count: int, first: int = 0) -> dict[int, Any]:
    """That many voyages under way, by their numbers."""
    durable_dag = environment.workflows.durable_dag
    numbers = range(first, first + count)
    items = [durable_dag.create_bulk_run_item(environment.workflows.Number(n=n)) for n in numbers]
    return dict(zip(numbers, await durable_dag.aio_run_many(items, wait_for_result=False), strict=True))


async def assert_all_completed(environment: Environment, runs: dict[int, Any]) -> None:
    """All of them, with the right results, and none of their tasks done twice: nobody but servers and services died."""
    await everybody_arrives(runs)
    for what in ("started", "sailed", "landed"):
        assert sorted(environment.journal.values(what, "n")) == sorted(runs), f"everybody {what} once"


async def everybody_arrives(runs: dict[int, Any]) -> None:
    """All of them, with the right results."""
    results = await asyncio.gather(*(run.aio_result() for run in runs.values()))
    assert [result["land"] for result in results] == [{"n": 2 * n} for n in runs]
