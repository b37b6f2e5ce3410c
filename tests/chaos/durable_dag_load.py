"""Load: runs of a DAG with a durable task in the middle, which sleeps, has a child, and sleeps again."""

from __future__ import annotations

import asyncio
from typing import Any

from acceptance.environment import Environment


async def start_runs(environment: Environment, count: int, first: int = 0) -> dict[int, Any]:
    """Start ``count`` runs; returns them by their numbers, which begin with ``first``."""
    durable_dag = environment.workflows.durable_dag
    numbers = range(first, first + count)
    items = [durable_dag.create_bulk_run_item(environment.workflows.Number(n=n)) for n in numbers]
    return dict(zip(numbers, await durable_dag.aio_run_many(items, wait_for_result=False), strict=True))


async def assert_all_completed(environment: Environment, runs: dict[int, Any]) -> None:
    """Assert that all runs return the right results, and that no task ran twice, because no worker died."""
    await assert_right_results(runs)
    for what in ("started", "slept", "finished"):
        assert sorted(environment.journal.values(what, "n")) == sorted(runs), f"each run {what} once"


async def assert_right_results(runs: dict[int, Any]) -> None:
    """Wait for the results of all runs, and assert that they are right."""
    results = await asyncio.gather(*(run.aio_result() for run in runs.values()))
    assert [result["finish"] for result in results] == [{"n": 2 * n} for n in runs]
