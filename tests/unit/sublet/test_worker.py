"""`Worker`: hello, heartbeats, and a graceful stop."""

from __future__ import annotations

import asyncio
from typing import Any

from sublet._declare.types import EmptyModel
from sublet._durable.context import DurableContext
from sublet._worker.tickets import CLAIM_REPEATED_S
from sublet._worker.worker import WorkerStatus
from sublet_protocol.messages import (
    Evicted,
    Finished,
    Goodbye,
    GrantDeclined,
    Heartbeat,
    Hello,
    Ping,
    Recorded,
    ShardMessage,
)
from support.virtual_time import in_virtual_time
from support.worker_harness import WorkerHarness, client


def named(bench: WorkerHarness, kind: type[Any]) -> list[ShardMessage]:
    """What went to all schedulers, of this kind."""
    return [r for e, _, records in bench.transport.sent if e == "sublet.workers" for r in records if type(r) is kind]


@client.durable_task(name="waiting", eviction_policy=None)
async def waiting(input: EmptyModel, ctx: DurableContext) -> None:
    await ctx.aio_sleep_for("1h")


@client.task(name="slow")
async def slow(input: EmptyModel, ctx: Any) -> dict[str, Any]:
    await asyncio.sleep(20)
    return {"done": True}


@in_virtual_time
async def test_a_worker_sends_hello_before_its_first_claim_and_then_heartbeats() -> None:
    async with WorkerHarness(slow, waiting, labels={"zone": "a"}) as bench:
        bench.run(slow)
        await asyncio.sleep(9)
        sent = [type(r) for _, _, records in bench.transport.sent for r in records]
        assert sent[0] is Hello
        assert sent.count(Heartbeat) == 3
        (hello,) = named(bench, Hello)
        assert isinstance(hello, Hello)
        assert {spec.name for spec in hello.workflows} == {"slow", "waiting"}
        assert (hello.slots, hello.durable_slots, hello.labels) == (100, 1_000, {"zone": "a"})
        assert bench.heartbeats[-1].leases[0].lease == "run.slow@1"
        bench.transport.say(Ping(hello=True))
        await bench.settled()
        assert len(named(bench, Hello)) == 2
        assert len(bench.heartbeats) == 4
        bench.transport.lose_connection()
        assert len(bench.heartbeats) == 5


@in_virtual_time
async def test_stop_finishes_running_tasks_with_heartbeats_and_sends_goodbye() -> None:
    bench = WorkerHarness(slow)
    await bench.worker.aio_start()
    bench.run(slow)
    await bench.until(lambda: bench.worker.held)
    stopping = asyncio.create_task(bench.worker.stop())
    await bench.settled()
    assert bench.worker.status is WorkerStatus.STOPPING
    assert bench.heartbeats[-1].draining
    beats = len(bench.heartbeats)
    bench.run(slow, run="late")
    await stopping
    assert len(bench.heartbeats) > beats + 3
    (finished,) = bench.of(Finished)
    assert (finished.lease, finished.next) == ("run.slow@1", False)
    assert named(bench, Goodbye) == [Goodbye(bench.worker.id)]
    assert len(bench.claims) == 1
    assert bench.transport.taken("task") == 0
    assert bench.transport.closed


@in_virtual_time
async def test_stop_evicts_tasks_that_wait_or_begin_to_wait() -> None:
    @client.durable_task(name="later", eviction_policy=None)
    async def later(input: EmptyModel, ctx: DurableContext) -> None:
        await asyncio.sleep(30)
        await ctx.aio_sleep_for("1h")

    bench = WorkerHarness(waiting, later)
    await bench.worker.aio_start()
    bench.run(waiting)
    bench.run(later, run="other")
    await bench.until(lambda: bench.of(Recorded))
    await bench.worker.stop()
    assert [(s.lease, s.cause, s.next) for s in bench.of(Evicted)] == [
        ("run.waiting@1", "worker_shutdown", False),
        ("other.later@1", "worker_shutdown", False),
    ]
    assert bench.transport.taken("durable") == 0


@in_virtual_time
async def test_stop_evicts_a_task_whose_branches_wait_for_each_other_as_ready() -> None:
    @client.durable_task(name="limited")
    async def limited(input: EmptyModel, ctx: DurableContext) -> None:
        two_at_a_time = asyncio.Semaphore(2)

        async def leg() -> None:
            async with two_at_a_time:
                await ctx.aio_sleep_for("1h")

        await asyncio.gather(*(leg() for _ in range(5)))

    bench = WorkerHarness(limited)
    await bench.worker.aio_start()
    bench.run(limited)
    await bench.until(lambda: bench.of(Recorded))
    await asyncio.sleep(60)
    assert not bench.of(Evicted)
    await bench.worker.stop()
    (evicted,) = bench.of(Evicted)
    assert (evicted.blocked, evicted.cause) == ((), "worker_shutdown")


@in_virtual_time
async def test_a_draining_worker_declines_a_grant_and_requeues_its_ticket() -> None:
    bench = WorkerHarness(slow)
    await bench.worker.aio_start()
    bench.answering = False
    bench.put_up(slow)
    bench.offer()
    await bench.until(lambda: bench.claims)
    stopping = asyncio.create_task(bench.worker.stop())
    await bench.settled()
    bench.answer("ticket-1")
    await stopping
    assert bench.of(GrantDeclined) == [GrantDeclined("run.slow@1", "ticket-1")]
    assert [ticket.id for ticket in bench.transport.requeued] == ["ticket-1"]
    assert not bench.of(Finished)


@in_virtual_time
async def test_a_draining_worker_requeues_a_ticket_without_an_answer() -> None:
    bench = WorkerHarness(slow)
    await bench.worker.aio_start()
    bench.answering = False
    bench.offer()
    await bench.until(lambda: bench.claims)
    began = asyncio.get_running_loop().time()
    await bench.worker.stop()
    assert asyncio.get_running_loop().time() - began < CLAIM_REPEATED_S + 1
    assert [ticket.id for ticket in bench.transport.requeued] == ["ticket-1"]


@in_virtual_time
async def test_stop_returns_after_the_last_report_is_confirmed() -> None:
    bench = WorkerHarness(slow)
    await bench.worker.aio_start()
    bench.run(slow)
    await bench.until(lambda: bench.worker.held)
    stopping = asyncio.create_task(bench.worker.stop())
    await asyncio.sleep(15)
    bench.transport.confirming.clear()
    await asyncio.sleep(60)
    assert bench.of(Finished)
    assert not stopping.done()
    assert not bench.transport.acked
    bench.transport.confirming.set()
    await stopping
    assert bench.transport.acked
