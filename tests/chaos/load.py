"""A mixed load: DAGs, durable tasks, waits for events, fan-outs, retries and released slots, with expected results."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

from acceptance.environment import Environment
from chaos.durable_dag_load import assert_right_results, start_runs

WORKFLOWS = ("durable_dag", "double", "await_payment", "fan_out", "stumble", "release")
CHILDREN = 10
"""Children of one fan-out."""


class Load:
    """Submits runs of all `WORKFLOWS`. ``submitted`` counts them by workflow, children included."""

    def __init__(self, environment: Environment) -> None:
        self._environment = environment
        self._durable_dags: dict[int, Any] = {}
        self._others: list[tuple[Any, Callable[[Any], bool]]] = []
        self._first = 0
        self.submitted: Counter[str] = Counter()
        environment.journal.open_gate("")  # for tasks that have released their slot

    async def add_up_to(self, runs: int) -> None:
        """Submit runs until there are at least that many."""
        while self.submitted.total() < runs:
            await self.add()

    async def add(self, durable_dags: int = 20, payments: int = 5) -> None:
        self._first += 1_000
        w = self._environment.workflows
        self._durable_dags |= await start_runs(self._environment, durable_dags, self._first)
        numbers = range(self._first, self._first + payments)
        for n in numbers:
            self._expect(await w.await_payment.aio_run(w.Number(n=n), wait_for_result=False), partial(_is_for, n))
        for n in numbers:
            await self._environment.client.event.aio_push("paid", {"order": n, "amount": 1})
        fan_out = await w.fan_out.aio_run(w.Number(n=CHILDREN), wait_for_result=False)
        self._expect(fan_out, lambda total: total.n == CHILDREN * (CHILDREN - 1))
        self._expect(await w.stumble.aio_run(wait_for_result=False), lambda receipt: receipt.n >= 1)
        for then in ("return", "fail once"):
            self._expect(
                await w.release.aio_run(w.Release(then=then), wait_for_result=False), lambda where: bool(where.worker)
            )
        self.submitted.update(
            durable_dag=durable_dags,
            double=durable_dags + CHILDREN,
            await_payment=payments,
            fan_out=1,
            stumble=1,
            release=2,
        )

    async def assert_right_results(self) -> None:
        """Wait for the results of all runs, and assert that they are right."""
        await assert_right_results(self._durable_dags)
        results = await asyncio.gather(*(run.aio_result() for run, _ in self._others))
        wrong = [result for result, (_, is_right) in zip(results, self._others, strict=True) if not is_right(result)]
        assert not wrong, wrong

    def _expect(self, run: Any, is_right: Callable[[Any], bool]) -> None:
        self._others.append((run, is_right))


def _is_for(order: int, paid: Any) -> bool:
    return bool(paid.order == order)
