"""`SubletTestEnvironment`: workflows in memory, with virtual time."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncGenerator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from sublet import (
    Context,
    DurableContext,
    FailedTaskRunExceptionGroup,
    NonRetryableException,
    RunCancelledError,
    RunStatus,
    SleepCondition,
    Sublet,
    UserEventCondition,
    or_,
)
from sublet.testing import NothingWillHappen, SubletTestEnvironment

sublet = Sublet()


@sublet.task(input_validator=dict)
async def double(input: dict[str, Any], ctx: Context) -> dict[str, int]:
    return {"n": 2 * input["n"]}


@sublet.durable_task(input_validator=dict)
async def rest(input: dict[str, Any], ctx: DurableContext) -> dict[str, str]:
    await ctx.aio_sleep_for(timedelta(days=input["days"]))
    return {"woke_at": (await ctx.aio_now()).isoformat()}


@sublet.durable_task(input_validator=dict)
async def order(input: dict[str, Any], ctx: DurableContext) -> dict[str, Any]:
    came = await ctx.aio_wait_for(
        "paid", or_(UserEventCondition("order.paid", f"input.id == {input['id']}"), SleepCondition(timedelta(days=3)))
    )
    return {"paid": "order.paid" in str(came), "runs": ctx.invocation_count}


async def test_a_task_runs_without_a_server() -> None:
    async with SubletTestEnvironment(sublet, [double]):
        assert await double.aio_run({"n": 21}) == {"n": 42}


async def test_waiting_for_a_result_lets_time_pass() -> None:
    async with SubletTestEnvironment(sublet, [rest]):
        assert await rest.aio_run({"days": 30}) == {"woke_at": "2030-01-31T00:00:00+00:00"}


async def test_an_event_in_time_ends_a_wait_and_without_it_the_deadline_does() -> None:
    async with SubletTestEnvironment(sublet, [order]) as env:
        paid = await order.aio_run({"id": 1}, wait_for_result=False)
        unpaid = await order.aio_run({"id": 2}, wait_for_result=False)
        await env.skip(days=2)
        await env.push("order.paid", {"id": 1})
        assert await paid.aio_result() == {"paid": True, "runs": 2}
        assert env.now < datetime(2030, 1, 3, 0, 1, tzinfo=UTC)
        assert await unpaid.aio_result() == {"paid": False, "runs": 2}
        assert timedelta(0) <= env.now - datetime(2030, 1, 4, tzinfo=UTC) < timedelta(seconds=1)


async def test_skip_runs_everything_that_is_due_until_its_end() -> None:
    async with SubletTestEnvironment(sublet, [rest]) as env:
        soon = await rest.aio_run({"days": 1}, wait_for_result=False)
        later = await rest.aio_run({"days": 1.001}, wait_for_result=False)
        await env.skip(days=1)
        assert await sublet.runs.aio_get_status(soon.workflow_run_id) is RunStatus.COMPLETED
        assert await sublet.runs.aio_get_status(later.workflow_run_id) is RunStatus.RUNNING


async def test_time_stands_still_while_the_test_does_something_else() -> None:
    async with SubletTestEnvironment(sublet, [rest]) as env:
        ref = await rest.aio_run({"days": 0.0001}, wait_for_result=False)
        await asyncio.sleep(0.05)
        assert env.now == datetime(2030, 1, 1, tzinfo=UTC)
        await ref.aio_result()


async def test_time_passes_only_when_the_code_of_the_test_waits() -> None:
    async def pay(env: SubletTestEnvironment) -> None:
        for _ in range(20):
            await asyncio.sleep(0)
        await env.push("order.paid", {"id": 1})

    async with SubletTestEnvironment(sublet, [order]) as env:
        result, _ = await asyncio.gather(order.aio_run({"id": 1}), pay(env))
        assert result["paid"]


async def test_code_that_sleeps_by_asyncio_is_skipped_too() -> None:
    @sublet.task(input_validator=dict, execution_timeout=timedelta(days=2))
    async def slow(input: dict[str, Any], ctx: Context) -> dict[str, float]:
        began = asyncio.get_running_loop().time()
        await asyncio.sleep(86_400)
        return {"took_s": round(asyncio.get_running_loop().time() - began)}

    async with SubletTestEnvironment(sublet, [slow]):
        assert await slow.aio_run({}) == {"took_s": 86_400}


async def test_timeouts_and_retries_come_due_in_order() -> None:
    began: list[datetime] = []

    @sublet.task(input_validator=dict, execution_timeout=timedelta(hours=1), retries=2, backoff_factor=60)
    async def stuck(input: dict[str, Any], ctx: Context) -> None:
        began.append(env.now)
        await asyncio.sleep(1_000_000)

    async with SubletTestEnvironment(sublet, [stuck]) as env:
        with pytest.raises(FailedTaskRunExceptionGroup, match="exceeded timeout of 3600 s"):
            await stuck.aio_run({})
    assert len(began) == 3
    pauses = [(after - before).total_seconds() for before, after in itertools.pairwise(began)]
    assert pauses == [pytest.approx(3_660, abs=3), pytest.approx(7_200, abs=3)]


async def test_a_run_without_a_worker_is_cancelled_when_its_schedule_timeout_has_passed() -> None:
    async with SubletTestEnvironment(sublet, [double]) as env:
        await env.workers[0].stop()
        with pytest.raises(RunCancelledError):
            await double.aio_run({"n": 1})
        assert timedelta(minutes=5) <= env.now - datetime(2030, 1, 1, tzinfo=UTC) < timedelta(minutes=5, seconds=5)


async def test_sync_tasks_run_in_threads_and_time_waits_for_them() -> None:
    @sublet.task(input_validator=dict, execution_timeout=timedelta(seconds=1))
    def blocking(input: dict[str, Any], ctx: Context) -> dict[str, int]:
        time.sleep(0.05)
        return {"n": double.run({"n": input["n"]})["n"] + 1}

    async with SubletTestEnvironment(sublet, [blocking, double]) as env:
        assert await blocking.aio_run({"n": 1}) == {"n": 3}
        assert env.now == datetime(2030, 1, 1, tzinfo=UTC)


@pytest.mark.parametrize("blocking", [True, False])
async def test_threads_that_end_at_once_are_noticed(blocking: bool) -> None:
    @sublet.task(input_validator=dict)
    async def threads(input: dict[str, Any], ctx: Context) -> dict[str, int]:
        return {"n": len([await asyncio.to_thread(int) for _ in range(300)])}

    async with SubletTestEnvironment(sublet, [threads]):
        assert (threads.run({}) if blocking else await threads.aio_run({})) == {"n": 300}


async def test_the_sync_methods_of_the_client_work_in_the_test_too() -> None:
    async with SubletTestEnvironment(sublet, [rest]) as env:
        ref = rest.run({"days": 2}, wait_for_result=False)
        assert ref.result() == {"woke_at": "2030-01-03T00:00:00+00:00"}
        assert env.now >= datetime(2030, 1, 3, tzinfo=UTC)


async def test_a_test_and_its_tasks_can_share_asyncio_events() -> None:
    began, go = asyncio.Event(), asyncio.Event()

    @sublet.task(input_validator=dict)
    async def meeting(input: dict[str, Any], ctx: Context) -> dict[str, bool]:
        began.set()
        await go.wait()
        return {"met": True}

    async with SubletTestEnvironment(sublet, [meeting]):
        ref = await meeting.aio_run({}, wait_for_result=False)
        await began.wait()
        go.set()
        assert await ref.aio_result() == {"met": True}


async def test_waiting_for_a_run_that_cannot_end_raises_with_the_reason() -> None:
    @sublet.durable_task(input_validator=dict)
    async def patient(input: dict[str, Any], ctx: DurableContext) -> None:
        await ctx.aio_wait_for_event("godot")

    async with SubletTestEnvironment(sublet, [patient]):
        with pytest.raises(NothingWillHappen, match=r"(?s)patient.*waits for event godot"):
            await patient.aio_run({})
        with pytest.raises(NothingWillHappen):
            patient.run({})


async def test_always_evict_finds_code_that_depends_on_staying_on_the_worker() -> None:
    count = itertools.count()

    @sublet.durable_task(input_validator=dict, eviction_policy=None)
    async def fickle(input: dict[str, Any], ctx: DurableContext) -> None:
        await ctx.aio_sleep_for(timedelta(seconds=1 + next(count)))
        await ctx.aio_sleep_for(timedelta(days=1))

    async with SubletTestEnvironment(sublet, [fickle]):
        await fickle.aio_run({})
    async with SubletTestEnvironment(sublet, [fickle], always_evict=True):
        with pytest.raises(FailedTaskRunExceptionGroup, match="NonDeterminismError"):
            await fickle.aio_run({})


async def test_a_task_fails_on_demand_and_is_retried() -> None:
    @sublet.task(input_validator=dict, retries=2, backoff_factor=10)
    async def brittle(input: dict[str, Any], ctx: Context) -> dict[str, int]:
        return {"retries": ctx.retry_count}

    async with SubletTestEnvironment(sublet, [brittle]) as env:
        env.fail_next(brittle, ConnectionError("away"), times=2)
        assert await brittle.aio_run({}) == {"retries": 2}
        env.fail_next(brittle, NonRetryableException("no"))
        with pytest.raises(FailedTaskRunExceptionGroup, match="NonRetryableException: no"):
            await brittle.aio_run({})


async def test_another_worker_runs_the_tasks_of_a_killed_worker() -> None:
    seen: list[str] = []

    @sublet.task(input_validator=dict)
    async def long(input: dict[str, Any], ctx: Context) -> dict[str, str]:
        try:
            seen.append(ctx.worker_id)
            await asyncio.sleep(20)
            return {"worker": ctx.worker_id}
        finally:
            seen.append("left")

    async with SubletTestEnvironment(sublet, [long]) as env:
        ref = await long.aio_run({}, wait_for_result=False)
        await env.skip(seconds=10)
        (first,) = env.workers
        second = await env.start_worker()
        await first.kill()
        assert await ref.aio_result() == {"worker": second.id}
        assert seen == [first.id, second.id, "left"]
        assert not first.is_alive


async def test_a_task_whose_worker_dies_at_its_start_is_run_by_the_next_worker() -> None:
    async with SubletTestEnvironment(sublet, [double]) as env:
        env.kill_at_next(double)
        ref = await double.aio_run({"n": 4}, wait_for_result=False)
        assert not env.workers[0].is_alive
        await env.skip(minutes=2)
        await env.start_worker()
        assert await ref.aio_result() == {"n": 8}


async def test_a_worker_that_stops_finishes_its_running_tasks() -> None:
    @sublet.task(input_validator=dict)
    async def long(input: dict[str, Any], ctx: Context) -> dict[str, bool]:
        await asyncio.sleep(30)
        return {"finished": True}

    async with SubletTestEnvironment(sublet, [long]) as env:
        ref = await long.aio_run({}, wait_for_result=False)
        await env.workers[0].stop()
        assert await ref.aio_result() == {"finished": True}


async def test_slots_are_those_that_were_given() -> None:
    running: list[int] = []

    @sublet.task(input_validator=dict)
    async def crowd(input: dict[str, Any], ctx: Context) -> None:
        running.append(1)
        most.append(len(running))
        await asyncio.sleep(5)
        running.pop()

    most: list[int] = []
    async with SubletTestEnvironment(sublet, [crowd], slots=2):
        await crowd.aio_run_many([crowd.create_bulk_run_item({}) for _ in range(6)])
    assert max(most) == 2


async def test_two_runs_of_one_test_are_equal() -> None:
    async def durable_dag() -> list[Any]:
        async with SubletTestEnvironment(sublet, [order, rest, double]) as env:
            refs = [await order.aio_run({"id": n}, wait_for_result=False) for n in range(5)]
            await env.push("order.paid", {"id": 3})
            results = [await ref.aio_result() for ref in refs]
            return [results, [str(ref) for ref in refs], env.now, [await env.log(ref) for ref in refs]]

    assert await durable_dag() == await durable_dag()


async def test_the_end_of_the_environment_restores_the_client() -> None:
    before = vars(sublet._connection).copy()
    async with SubletTestEnvironment(sublet, [double]):
        await double.aio_run({"n": 1})
    assert vars(sublet._connection) == before


async def test_the_end_of_the_environment_cleans_up_unfinished_tasks() -> None:
    freed: list[str] = []

    async def pool() -> AsyncGenerator[str, None]:
        yield "pool"
        freed.append("pool")

    @sublet.task(input_validator=dict)
    async def holder(input: dict[str, Any], ctx: Context) -> None:
        try:
            await asyncio.sleep(1_000)
        finally:
            freed.append("task")

    async with SubletTestEnvironment(sublet, [holder], lifespan=pool):
        await holder.aio_run({}, wait_for_result=False)
    assert sorted(freed) == ["pool", "task"]


async def test_workflows_of_another_client_are_refused() -> None:
    @Sublet().task(input_validator=dict)
    async def stranger(input: dict[str, Any], ctx: Context) -> None: ...

    with pytest.raises(ValueError, match="another client"):
        async with SubletTestEnvironment(sublet, [stranger]):
            pass
