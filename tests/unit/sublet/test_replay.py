"""Durable tasks on a worker: recorded operations, replay, and the order of results."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from sublet._declare.conditions import SleepCondition, UserEventCondition, or_
from sublet._declare.types import EmptyModel
from sublet._durable.context import DurableContext
from sublet._errors import NonDeterminismError, TaskRunError
from sublet_protocol import limits
from sublet_protocol.messages import Evicted, Finished, Record, Recorded, TaskError
from sublet_protocol.specs import EventCondition
from support.worker_harness import WorkerHarness, client


def event(key: str, payload: object) -> dict[str, Any]:
    return {"CREATE": {key: [payload]}}


async def test_a_sleep_evicts_at_once_and_the_next_invocation_continues_after_it() -> None:
    began = []

    @client.durable_task()
    async def sleeper(input: EmptyModel, ctx: DurableContext) -> dict[str, Any]:
        began.append(ctx.invocation_count)
        slept = await ctx.aio_sleep_for("30s", label="nap")
        return {"slept": slept.duration.total_seconds()}

    async with WorkerHarness(sleeper) as bench:
        task_run = bench.run(sleeper)
        evicted = await bench.evicted()
        assert [(o.operation_id, o.kind, o.label) for o in evicted.operations] == [("1", "wait", "nap")]
        assert evicted.blocked == (("1",),)
        assert evicted.delivered == 0
        await bench.until(lambda: bench.transport.acked)
        bench.sleep_over(task_run, "1")
        bench.run(sleeper)
        assert await bench.finished() == {"slept": 30.0}
        assert began == [1, 2]
        assert bench.transport.taken("durable") == 0


async def test_the_slot_is_free_only_after_the_checkpoint_is_confirmed() -> None:
    ended = []

    @client.durable_task()
    async def sleeper(input: EmptyModel, ctx: DurableContext) -> None:
        try:
            await ctx.aio_sleep_for("1h")
        finally:
            ended.append(True)

    async with WorkerHarness(sleeper) as bench:
        bench.transport.confirming.set()
        bench.run(sleeper)
        bench.transport.confirming.clear()
        bench.answering = True
        await bench.until(lambda: bench.of(Evicted))
        await bench.settled()
        assert not ended
        bench.transport.confirming.set()
        await bench.until(lambda: ended)


async def test_branches_keep_their_operation_ids_and_their_order_on_replay() -> None:
    seen: list[list[str]] = []

    @client.durable_task()
    async def racing(input: EmptyModel, ctx: DurableContext) -> dict[str, Any]:
        order: list[str] = []
        seen.append(order)

        async def leg(name: str, seconds: int) -> None:
            await ctx.aio_sleep_for(timedelta(seconds=seconds))
            order.append(f"{name}1")
            await ctx.aio_sleep_for(timedelta(seconds=seconds))
            order.append(f"{name}2")

        await asyncio.gather(leg("a", 1), leg("b", 2), leg("c", 3))
        return {"order": order}

    async with WorkerHarness(racing) as bench:
        task_run = bench.run(racing)
        first = await bench.evicted(1)
        assert {o.operation_id for o in first.operations} == {"t0.1", "t1.1", "t2.1"}
        assert sorted(first.blocked) == [("t0.1",), ("t1.1",), ("t2.1",)]
        for operation_id in ("t2.1", "t0.1", "t1.1"):
            bench.sleep_over(task_run, operation_id)
        bench.run(racing)
        second = await bench.evicted(2)
        assert second.delivered == 3
        assert [o.operation_id for o in second.operations] == ["t2.2", "t0.2", "t1.2"]
        for operation_id in ("t1.2", "t2.2", "t0.2"):
            bench.sleep_over(task_run, operation_id)
        bench.run(racing)
        assert await bench.finished() == {"order": ["c1", "a1", "b1", "b2", "c2", "a2"]}
        assert seen[1] == ["c1", "a1", "b1"]


async def test_results_on_the_worker_are_delivered_in_the_order_of_their_completion() -> None:
    order: list[str] = []

    @client.durable_task(eviction_policy=None)
    async def resident(input: EmptyModel, ctx: DurableContext) -> dict[str, Any]:
        async def leg(name: str) -> None:
            await ctx.aio_wait_for_event(name)
            order.append(name)

        async with asyncio.TaskGroup() as group:
            for name in "abc":
                group.create_task(leg(name))
        return {"order": order}

    async with WorkerHarness(resident) as bench:
        task_run = bench.run(resident)
        await bench.until(lambda: bench.of(Recorded))
        (recorded,) = bench.of(Recorded)
        assert recorded.waiting
        for operation_id, key in (("t2.1", "c"), ("t0.1", "a"), ("t1.1", "b")):
            bench.end(task_run, operation_id, event(key, {}))
        assert await bench.finished() == {"order": ["c", "a", "b"]}
        assert not bench.of(Evicted)


async def test_a_missing_result_delays_the_results_after_it() -> None:
    order: list[str] = []

    @client.durable_task(eviction_policy=None)
    async def resident(input: EmptyModel, ctx: DurableContext) -> None:
        async def leg(name: str) -> None:
            await ctx.aio_wait_for_event(name)
            order.append(name)

        await asyncio.gather(leg("a"), leg("b"))

    async with WorkerHarness(resident) as bench:
        task_run = bench.run(resident)
        await bench.until(lambda: bench.of(Recorded))
        say = bench.transport.say
        lost: list[Record] = []
        bench.transport.say = lost.append  # type: ignore[method-assign,assignment]
        bench.end(task_run, "t1.1", event("b", {}))
        bench.transport.say = say  # type: ignore[method-assign]
        bench.end(task_run, "t0.1", event("a", {}))
        await bench.settled()
        assert order == []
        bench.worker._runner._send_heartbeat()  # type: ignore[union-attr]
        assert bench.heartbeats[-1].leases[0].delivered == 0
        say(*lost)
        await bench.until(lambda: bench.of(Finished))
        assert order == ["b", "a"]


async def test_a_branch_that_waits_for_another_by_a_plain_event_does_not_stop_the_replay() -> None:
    @client.durable_task()
    async def handing_over(input: EmptyModel, ctx: DurableContext) -> dict[str, Any]:
        ready = asyncio.Event()
        order: list[str] = []

        async def second() -> None:
            await ready.wait()
            order.append("told")
            await ctx.aio_sleep_for("2s")
            order.append("second")

        async def first() -> None:
            await ctx.aio_sleep_for("1s")
            order.append("first")
            ready.set()
            await ctx.aio_sleep_for("3s")

        await asyncio.gather(second(), first())
        return {"order": order}

    async with WorkerHarness(handing_over) as bench:
        task_run = bench.run(handing_over)
        # One branch is evicted on something unknown, so the task stays; what the other waits for is armed.
        await bench.until(lambda: bench.of(Recorded))
        assert not bench.of(Recorded)[0].waiting
        bench.sleep_over(task_run, "t1.1")
        evicted = await bench.evicted()
        assert sorted(o.operation_id for o in evicted.operations) == ["t0.1", "t1.2"]
        bench.sleep_over(task_run, "t1.2")
        bench.sleep_over(task_run, "t0.1")
        bench.run(handing_over)
        assert await bench.finished() == {"order": ["first", "told", "second"]}


async def test_a_branch_that_polls_without_a_pause_does_not_stop_the_replay() -> None:
    @client.durable_task()
    async def polling(input: EmptyModel, ctx: DurableContext) -> dict[str, Any]:
        slept: list[bool] = []

        async def sleep() -> None:
            await ctx.aio_sleep_for("1s")
            slept.append(True)

        sleeping = asyncio.create_task(sleep())
        while not slept:  # noqa: ASYNC110 - as users write it
            await asyncio.sleep(0)
        await sleeping
        return {"slept": True}

    async with WorkerHarness(polling) as bench:
        task_run = bench.run(polling)
        await bench.until(lambda: bench.of(Recorded))
        bench.sleep_over(task_run, "t0.1")
        assert await bench.finished() == {"slept": True}


async def test_replay_waits_for_a_slower_branch_that_was_first_before() -> None:
    order: list[str] = []
    pauses = [0.0, 0.3]

    @client.durable_task()
    async def uneven(input: EmptyModel, ctx: DurableContext) -> None:
        order.clear()

        async def slow() -> None:
            await asyncio.sleep(pauses[min(ctx.invocation_count - 1, 1)])
            await ctx.aio_sleep_for("1s")
            order.append("slow")

        async def quick() -> None:
            await ctx.aio_sleep_for("2s")
            order.append("quick")

        await asyncio.gather(slow(), quick())

    async with WorkerHarness(uneven) as bench:
        task_run = bench.run(uneven)
        await bench.evicted()
        bench.sleep_over(task_run, "t0.1")
        bench.sleep_over(task_run, "t1.1")
        bench.run(uneven)
        await bench.finished()
        assert order == ["slow", "quick"]


async def test_a_divergence_names_the_recorded_and_the_requested_operation() -> None:
    asks = ["30s", "40s"]

    @client.durable_task()
    async def changing(input: EmptyModel, ctx: DurableContext) -> None:
        await ctx.aio_sleep_for(asks[ctx.invocation_count - 1])

    async with WorkerHarness(changing) as bench:
        task_run = bench.run(changing)
        await bench.evicted()
        bench.sleep_over(task_run, "1")
        bench.run(changing)
        failed = await bench.failed()
        assert failed.error.type == "NonDeterminismError"
        assert "operation 1 " in failed.error.message
        assert "a sleep of 30 s" in failed.error.message
        assert "a sleep of 40 s" in failed.error.message


async def test_a_non_determinism_error_is_raised_at_the_await_with_its_operation_id() -> None:
    caught: list[NonDeterminismError] = []

    @client.durable_task()
    async def changing(input: EmptyModel, ctx: DurableContext) -> None:
        try:
            await ctx.aio_wait_for_event("a" if ctx.invocation_count == 1 else "b")
        except NonDeterminismError as error:
            caught.append(error)

    async with WorkerHarness(changing) as bench:
        task_run = bench.run(changing)
        await bench.evicted()
        bench.end(task_run, "1", event("a", {}))
        bench.run(changing)
        await bench.finished()
        assert (caught[0].node_id, caught[0].invocation_count) == ("1", 2)
        assert len(bench.log(task_run)) == 1


async def test_conditions_may_change_their_order_but_not_their_groups() -> None:
    first = UserEventCondition("paid", "input.amount > 1")
    second = SleepCondition("1h")
    asked: list[list[Any]] = [[or_(first, second)], [or_(second, first)], [first, second]]

    @client.durable_task()
    async def choosing(input: EmptyModel, ctx: DurableContext) -> dict[str, Any]:
        return await ctx.aio_wait_for("decision", *asked[ctx.invocation_count - 1])

    async with WorkerHarness(choosing) as bench:
        task_run = bench.run(choosing)
        evicted = await bench.evicted()
        assert len(evicted.operations[0].groups) == 1
        bench.run(choosing)
        await bench.evicted(2)
        assert not bench.of(Evicted)[1].operations
        bench.end(task_run, "1", event("paid", {"amount": 2}))
        bench.run(choosing)
        assert (await bench.failed()).error.type == "NonDeterminismError"


async def test_now_is_a_memo_that_is_recorded_with_the_next_report() -> None:
    moments: list[datetime] = []

    @client.durable_task()
    async def clock(input: EmptyModel, ctx: DurableContext) -> None:
        moments.append(await ctx.aio_now())
        await ctx.aio_sleep_until(datetime.fromtimestamp(10, UTC))
        moments.append(await ctx.aio_now())

    times = iter([1_000.0, 1_010.0, 2_000.0, 3_000.0, 4_000.0])
    async with WorkerHarness(clock, now=lambda: next(times, 9_000.0)) as bench:
        task_run = bench.run(clock)
        evicted = await bench.evicted()
        assert [(o.operation_id, o.kind) for o in evicted.operations] == [("1", "memo"), ("2", "memo"), ("3", "wait")]
        bench.sleep_over(task_run, "3")
        bench.run(clock)
        await bench.finished()
        assert moments[0] == moments[1]
        assert moments[2] > moments[0]


async def test_a_memo_is_recorded_before_the_code_continues_and_is_not_called_again() -> None:
    calls: list[tuple[int, str]] = []

    async def fetch(number: int, *, name: str) -> dict[str, Any]:
        calls.append((number, name))
        return {"n": number}

    def nothing() -> None:
        calls.append((0, ""))

    @client.durable_task()
    async def remembering(input: EmptyModel, ctx: DurableContext) -> dict[str, Any]:
        fetched = await ctx.aio_memo(fetch, dict[str, Any], 7, name="x")
        await ctx._aio_memo(nothing, type(None))
        await ctx.aio_sleep_for("1s")
        return fetched

    async with WorkerHarness(remembering) as bench:
        task_run = bench.run(remembering)
        await bench.evicted()
        assert [o.operation_id for r in bench.of(Recorded) for o in r.operations] == ["1", "2"]
        assert [r.number for r in bench.of(Recorded)] == [1, 2]
        bench.sleep_over(task_run, "3")
        bench.run(remembering)
        assert await bench.finished() == {"n": 7}
        assert calls == [(7, "x"), (0, "")]


async def test_memos_of_different_functions_differ() -> None:
    def one() -> int:
        return 1

    def two() -> int:
        return 2

    @client.durable_task()
    async def remembering(input: EmptyModel, ctx: DurableContext) -> None:
        await ctx.aio_memo(one if ctx.invocation_count == 1 else two, int)
        await ctx.aio_sleep_for("1s")

    async with WorkerHarness(remembering) as bench:
        task_run = bench.run(remembering)
        await bench.evicted()
        bench.sleep_over(task_run, "2")
        bench.run(remembering)
        assert (await bench.failed()).error.type == "NonDeterminismError"


async def test_outputs_of_children_are_in_the_order_of_the_requests() -> None:
    @client.task(name="child")
    async def child(input: EmptyModel, ctx: Any) -> dict[str, Any]:
        return {}

    @client.durable_task()
    async def parent(input: EmptyModel, ctx: DurableContext) -> dict[str, Any]:
        items = [child.create_bulk_run_item(EmptyModel(n=n)) for n in range(3)]
        outputs = await child.aio_run_many(items)
        return {"outputs": [output["n"] for output in outputs]}

    async with WorkerHarness(parent) as bench:
        task_run = bench.run(parent)
        evicted = await bench.evicted()
        assert evicted.blocked == (("1", "2", "3"),)
        assert [bytes(o.child.input) for o in evicted.operations if o.child] == [b'{"n":0}', b'{"n":1}', b'{"n":2}']
        for operation_id in ("3", "1", "2"):
            bench.end(task_run, operation_id, {"n": int(operation_id) * 10})
        bench.run(parent)
        assert await bench.finished() == {"outputs": [10, 20, 30]}


async def test_a_large_checkpoint_is_split_into_several_messages(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(limits, "REPORT_MAX_BYTES", 250_000)

    @client.task(name="child")
    async def child(input: EmptyModel, ctx: Any) -> dict[str, Any]:
        return {}

    @client.durable_task()
    async def parent(input: EmptyModel, ctx: DurableContext) -> None:
        await child.aio_run_many([child.create_bulk_run_item(EmptyModel(text="x" * 100_000)) for _ in range(6)])

    async with WorkerHarness(parent) as bench:
        bench.run(parent)
        evicted = await bench.evicted()
        parts = [*bench.of(Recorded), evicted]
        assert [[o.operation_id for o in part.operations] for part in parts] == [["1", "2"], ["3", "4"], ["5", "6"]]
        assert evicted.blocked == (("1", "2", "3", "4", "5", "6"),)


async def test_a_failed_child_raises_at_its_await_on_every_replay() -> None:
    @client.task(name="child")
    async def child(input: EmptyModel, ctx: Any) -> dict[str, Any]:
        return {}

    raised: list[TaskRunError] = []

    @client.durable_task()
    async def parent(input: EmptyModel, ctx: DurableContext) -> None:
        try:
            await child.aio_run()
        except TaskRunError as error:
            raised.append(error)
        await ctx.aio_sleep_for("1s")

    async with WorkerHarness(parent) as bench:
        task_run = bench.run(parent)
        await bench.evicted()
        bench.end(task_run, "1", error=TaskError("ValueError", "no luck", "trace", "child-run.child"))
        bench.run(parent)
        await bench.evicted(2)
        bench.sleep_over(task_run, "2")
        bench.run(parent)
        await bench.finished()
        assert [(e.exc_type, e.exc, e.task_run_external_id) for e in raised] == [
            ("ValueError", "no luck", "child-run.child")
        ] * 2


async def test_a_child_that_is_not_awaited_is_recorded_before_the_code_continues() -> None:
    @client.task(name="child")
    async def child(input: EmptyModel, ctx: Any) -> dict[str, Any]:
        return {}

    refs: list[str] = []

    @client.durable_task()
    async def parent(input: EmptyModel, ctx: DurableContext) -> None:
        refs.append(str(await child.aio_run(wait_for_result=False)))
        await ctx.aio_sleep_for("1s")

    async with WorkerHarness(parent) as bench:
        task_run = bench.run(parent)
        evicted = await bench.evicted()
        assert [o.operation_id for r in bench.of(Recorded) for o in r.operations] == ["1"]
        assert evicted.blocked == (("2",),)
        bench.end(task_run, "1", {})
        bench.sleep_over(task_run, "2")
        bench.run(parent)
        await bench.finished()
        assert refs[0] == refs[1]


async def test_an_event_wait_listens_from_the_position_of_its_branch() -> None:
    @client.durable_task()
    async def listening(input: EmptyModel, ctx: DurableContext) -> None:
        await ctx.aio_wait_for_event("a")
        while True:
            await asyncio.gather(ctx.aio_wait_for_event("b"), ctx.aio_sleep_for("1s"))
            await ctx.aio_wait_for_event("c")

    async with WorkerHarness(listening) as bench:
        task_run = bench.run(listening, position=5)
        assert (await bench.evicted(1)).operations[0].since == 5
        bench.end(task_run, "1", event("a", {}), position=10)
        bench.run(listening, position=5)
        assert {o.since for o in (await bench.evicted(2)).operations} == {10}
        bench.end(task_run, "t0.1", event("b", {}), position=20)
        bench.sleep_over(task_run, "t1.1", position=30)
        bench.run(listening, position=5)
        assert [o.since for o in (await bench.evicted(3)).operations] == [30]


async def test_the_lookback_begins_at_the_recorded_time() -> None:
    @client.durable_task()
    async def looking_back(input: EmptyModel, ctx: DurableContext) -> dict[str, Any]:
        return await ctx.aio_wait_for_event("k", scope="s", lookback_window=timedelta(seconds=100))

    async with WorkerHarness(looking_back, now=lambda: 5_000.0) as bench:
        task_run = bench.run(looking_back)
        evicted = await bench.evicted()
        (condition,) = evicted.operations[1].groups[0]
        assert isinstance(condition, EventCondition)
        assert (condition.since_s, condition.scope) == (4_900.0, "s")
        bench.end(task_run, "2", event("k", {"x": 1}))
        bench.run(looking_back)
        assert await bench.finished() == {"x": 1}


async def test_a_payload_has_the_type_of_its_validator() -> None:
    class Paid(EmptyModel):
        amount: int

    @client.durable_task()
    async def paying(input: EmptyModel, ctx: DurableContext) -> dict[str, Any]:
        paid = await ctx.aio_wait_for_event("paid", payload_validator=Paid)
        assert isinstance(paid, Paid)
        return {"amount": paid.amount}

    async with WorkerHarness(paying) as bench:
        task_run = bench.run(paying)
        await bench.evicted()
        bench.end(task_run, "1", event("paid", {"amount": "12"}))
        bench.run(paying)
        assert await bench.finished() == {"amount": 12}


async def test_a_long_log_is_replayed_completely() -> None:
    @client.durable_task()
    async def long(input: EmptyModel, ctx: DurableContext) -> dict[str, Any]:
        for _ in range(700):
            await ctx.aio_sleep_for("1s")
        return {"waits": ctx.wait_index}

    async with WorkerHarness(long, durable_slots=1) as bench:
        task_run = bench.run(long)
        await bench.evicted()
        evicted = bench.of(Evicted)[0]
        entry = bench.log(task_run)["1"]
        for number in range(1, 701):
            bench.log(task_run)[str(number)] = type(entry)(
                str(number), "wait", evicted.operations[0].fingerprint, entry.asked
            )
            bench.sleep_over(task_run, str(number))
        bench.run(long)
        assert await bench.finished() == {"waits": 700}
