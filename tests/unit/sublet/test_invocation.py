"""`DurableInvocation`: when a durable task is evicted, when it stays, and how its code is dropped."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import Any

import pytest

from sublet._declare.types import EmptyModel, EvictionPolicy
from sublet._durable import invocation as invocation_module
from sublet._durable.context import DurableContext
from sublet_protocol.messages import Evicted, Failed, Finished, Record, Recorded, Revoked, TimeoutExtended
from support.virtual_time import in_virtual_time
from support.worker_harness import WorkerHarness, client

TEN_SECONDS = EvictionPolicy(ttl=timedelta(seconds=10))


async def test_a_task_is_not_evicted_while_a_branch_works() -> None:
    finished_work: list[int] = []

    @client.durable_task()
    async def busy(input: EmptyModel, ctx: DurableContext) -> None:
        async def work() -> None:
            await asyncio.sleep(0.2)
            finished_work.append(ctx.invocation_count)

        await asyncio.gather(ctx.aio_sleep_for("1h"), work())

    async with WorkerHarness(busy) as bench:
        bench.run(busy)
        await bench.until(lambda: bench.of(Recorded))
        assert [o.operation_id for o in bench.of(Recorded)[0].operations] == ["t0.1"]
        assert not finished_work
        evicted = await bench.evicted()
        assert finished_work == [1]
        assert evicted.operations == ()
        assert evicted.blocked == (("t0.1",),)


async def test_a_waiting_task_with_a_timeout_stays_until_the_timeout_expires() -> None:
    @client.durable_task()
    async def impatient(input: EmptyModel, ctx: DurableContext) -> dict[str, Any]:
        try:
            async with asyncio.timeout(0.3):
                await ctx.aio_sleep_for("1h")
        except TimeoutError:
            return {"patience": "over"}
        return {}

    async with WorkerHarness(impatient) as bench:
        bench.run(impatient)
        assert await bench.finished() == {"patience": "over"}
        assert not bench.of(Evicted)


@in_virtual_time
async def test_a_waiting_task_stays_for_its_ttl_and_its_clock_is_paused() -> None:
    @client.durable_task(eviction_policy=TEN_SECONDS, execution_timeout="5s")
    async def patient(input: EmptyModel, ctx: DurableContext) -> None:
        await asyncio.sleep(1)
        await ctx.aio_sleep_for("1h")

    async with WorkerHarness(patient) as bench:
        loop = asyncio.get_running_loop()
        began = loop.time()
        bench.run(patient, timeout_s=5.0)
        await bench.until(lambda: bench.of(Recorded))
        assert bench.of(Recorded)[0].waiting
        assert bench.worker.held == {"waiting": 1}
        evicted = await bench.evicted()
        assert 11 <= loop.time() - began < 12
        assert evicted.cause == "ttl_exceeded"
        assert 0.99 <= evicted.active_s < 2
        assert not bench.of(Failed)


@in_virtual_time
async def test_a_result_within_the_ttl_resumes_the_task_without_an_eviction() -> None:
    @client.durable_task(eviction_policy=TEN_SECONDS)
    async def patient(input: EmptyModel, ctx: DurableContext) -> dict[str, Any]:
        await ctx.aio_sleep_for("1s")
        await ctx.aio_sleep_for("1s")
        return {"invocation": ctx.invocation_count}

    async with WorkerHarness(patient) as bench:
        task_run = bench.run(patient)
        await bench.until(lambda: len(bench.of(Recorded)) == 1)
        bench.sleep_over(task_run, "1")
        await bench.until(lambda: len(bench.of(Recorded)) == 2)
        bench.sleep_over(task_run, "2")
        assert await bench.finished() == {"invocation": 1}
        assert [r.number for r in bench.of(Recorded)] == [1, 2]


@in_virtual_time
async def test_a_result_that_wakes_no_branch_is_followed_by_another_waiting_report() -> None:
    @client.durable_task(eviction_policy=None)
    async def waiting(input: EmptyModel, ctx: DurableContext) -> None:
        await child.aio_run_many([child.create_bulk_run_item() for _ in range(2)])

    @client.task(name="child")
    async def child(input: EmptyModel, ctx: Any) -> None: ...

    async with WorkerHarness(waiting) as bench:
        task_run = bench.run(waiting)
        await bench.until(lambda: len(bench.of(Recorded)) == 1)
        bench.end(task_run, "2", {})
        await bench.until(lambda: len(bench.of(Recorded)) == 2)
        assert (bench.of(Recorded)[1].waiting, bench.of(Recorded)[1].operations) == (True, ())
        bench.end(task_run, "1", {})
        await bench.until(lambda: bench.of(Finished))


@in_virtual_time
async def test_without_a_policy_a_task_is_evicted_only_by_a_drain() -> None:
    @client.durable_task(eviction_policy=None)
    async def settled(input: EmptyModel, ctx: DurableContext) -> None:
        await ctx.aio_sleep_for("1000h")

    async with WorkerHarness(settled) as bench:
        bench.run(settled)
        await bench.until(lambda: bench.of(Recorded))
        await asyncio.sleep(10_000)
        assert not bench.of(Evicted)
        assert bench.transport.taken("durable") == 1


@in_virtual_time
async def test_capacity_pressure_evicts_the_waiting_task_of_lowest_priority() -> None:
    def waiting_task(name: str, policy: EvictionPolicy | None) -> Any:
        @client.durable_task(name=name, eviction_policy=policy)
        async def waiting(input: EmptyModel, ctx: DurableContext) -> None:
            await ctx.aio_sleep_for("1000h")

        return waiting

    hour = timedelta(hours=1)
    important = waiting_task("important", EvictionPolicy(ttl=hour, priority=5))
    unimportant = waiting_task("unimportant", EvictionPolicy(ttl=hour, priority=1))
    fixed = waiting_task("fixed", EvictionPolicy(ttl=hour, allow_capacity_eviction=False, priority=0))
    never = waiting_task("never", None)
    async with WorkerHarness(important, unimportant, fixed, never, durable_slots=4) as bench:
        for number, workflow in enumerate((never, fixed, important)):
            bench.run(workflow, run=f"run{number}")
        await bench.until(lambda: len(bench.of(Recorded)) == 3)
        assert not bench.of(Evicted)
        bench.run(unimportant, run="run4")
        evicted = await bench.evicted()
        assert (evicted.lease, evicted.cause) == ("run4.unimportant@1", "capacity_pressure")
        bench.run(unimportant, run="run5")
        await bench.evicted(2)
        assert bench.transport.taken("durable") == 3


async def test_a_result_during_the_checkpoint_is_left_to_the_next_invocation() -> None:
    went_on: list[int] = []

    @client.durable_task()
    async def sleeper(input: EmptyModel, ctx: DurableContext) -> None:
        await ctx.aio_sleep_for("1s")
        went_on.append(ctx.invocation_count)

    async with WorkerHarness(sleeper) as bench:
        bench.transport.confirming.clear()
        task_run = bench.run(sleeper)
        await bench.until(lambda: bench.of(Evicted))
        bench.sleep_over(task_run, "1")
        await bench.settled()
        bench.transport.confirming.set()
        await bench.until(lambda: not bench.worker.held)
        bench.run(sleeper)
        await bench.finished()
        assert went_on == [2]


async def test_a_dropped_task_that_catches_its_cancellation_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(invocation_module, "CANCEL_PAUSE_S", 0.01)
    refused: list[str] = []

    @client.durable_task()
    async def stubborn(input: EmptyModel, ctx: DurableContext) -> dict[str, Any]:
        while ctx.invocation_count == 1:
            try:
                await ctx.aio_sleep_for("1s")
            except asyncio.CancelledError as error:
                refused.append(type(error).__name__)
        return {"must not": "be seen"}

    async with WorkerHarness(stubborn) as bench:
        bench.run(stubborn)
        await bench.evicted()
        await bench.until(lambda: len(refused) > invocation_module.REFUSALS_MAX)
        await bench.settled()
        reports = list(bench.reports)
        await asyncio.sleep(0.1)
        assert bench.reports == reports
        assert len(refused) == invocation_module.REFUSALS_MAX + 1
        assert not bench.of(Finished)
        assert set(refused) == {"CancelledError"}
        assert bench.transport.taken("durable") == 0


async def test_a_dropped_task_that_returns_something_is_not_reported() -> None:
    returned: list[bool] = []

    @client.durable_task()
    async def quick(input: EmptyModel, ctx: DurableContext) -> dict[str, Any]:
        try:
            await ctx.aio_sleep_for("1s")
        except asyncio.CancelledError:
            returned.append(True)
            await ctx.aio_refresh_timeout("1m")
        return {"a": 1}

    async with WorkerHarness(quick) as bench:
        bench.run(quick)
        await bench.until(lambda: returned)
        await bench.settled()
        assert not bench.of(Finished)
        assert not bench.of(TimeoutExtended)


async def test_dropped_code_has_time_to_clean_up() -> None:
    cleaned: list[str] = []

    @client.durable_task()
    async def tidy(input: EmptyModel, ctx: DurableContext) -> None:
        try:
            await ctx.aio_sleep_for("1s")
        finally:
            await asyncio.sleep(0.1)
            cleaned.append("up")

    async with WorkerHarness(tidy) as bench:
        bench.run(tidy)
        await bench.until(lambda: cleaned)


async def test_a_task_that_returns_with_open_operations_finishes() -> None:
    given_up: list[str] = []

    @client.durable_task()
    async def leaving(input: EmptyModel, ctx: DurableContext) -> dict[str, Any]:
        async def background() -> None:
            try:
                await ctx.aio_sleep_for("1h")
            except asyncio.CancelledError:
                given_up.append("background")
                raise

        ctx_task = asyncio.create_task(background())
        await asyncio.sleep(0.01)
        assert not ctx_task.done()
        return {"done": True}

    async with WorkerHarness(leaving) as bench:
        bench.run(leaving)
        assert await bench.finished() == {"done": True}
        await bench.until(lambda: given_up)


@in_virtual_time
async def test_a_cancelled_task_sees_is_cancelled_and_is_dropped_without_a_report() -> None:
    seen: list[bool] = []

    @client.durable_task(eviction_policy=None)
    async def waiting(input: EmptyModel, ctx: DurableContext) -> None:
        async def watch() -> None:
            while not ctx.is_cancelled:  # noqa: ASYNC110 - as users write it
                await asyncio.sleep(0.1)
            seen.append(True)

        await asyncio.gather(watch(), ctx.aio_sleep_for("1h"))

    async with WorkerHarness(waiting) as bench:
        task_run = bench.run(waiting)
        await bench.until(lambda: bench.of(Recorded))
        bench.transport.say(Revoked(bench.lease(task_run), "cancelled"))
        await bench.until(lambda: bench.transport.acked)
        assert seen
        assert not bench.of(Finished)
        assert not bench.of(Failed)
        assert not bench.worker.held


@in_virtual_time
async def test_the_execution_timeout_counts_active_time_only() -> None:
    @client.durable_task(eviction_policy=None)
    async def working(input: EmptyModel, ctx: DurableContext) -> None:
        await ctx.aio_sleep_for("1h")
        await asyncio.sleep(100)

    async with WorkerHarness(working) as bench:
        loop = asyncio.get_running_loop()
        task_run = bench.run(working, timeout_s=3.0)
        await bench.until(lambda: bench.of(Recorded))
        await asyncio.sleep(1_000)
        assert not bench.of(Failed)
        bench.sleep_over(task_run, "1")
        began = loop.time()
        failed = await bench.failed()
        assert 2.9 <= loop.time() - began < 3.5
        assert (failed.error.type, failed.retryable) == ("TimeoutError", True)


async def test_results_for_another_lease_are_ignored() -> None:
    @client.durable_task(eviction_policy=None)
    async def waiting(input: EmptyModel, ctx: DurableContext) -> None:
        await ctx.aio_sleep_for("1h")

    async with WorkerHarness(waiting) as bench:
        task_run = bench.run(waiting)
        await bench.until(lambda: bench.of(Recorded))
        stale: list[Record] = []
        say = bench.transport.say
        bench.transport.say = lambda *records: stale.extend(records)  # type: ignore[method-assign]
        bench.sleep_over(task_run, "1")
        bench.transport.say = say  # type: ignore[method-assign]
        (satisfied,) = stale
        say(type(satisfied)(f"{task_run}@7", "1", satisfied.done))  # type: ignore[attr-defined]
        await bench.settled()
        assert not bench.of(Finished)
        say(satisfied)
        await bench.until(lambda: bench.of(Finished))
