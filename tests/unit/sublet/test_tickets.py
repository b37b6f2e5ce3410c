"""`Tickets`: the slots that RabbitMQ counts as taken are those in which tasks run, also after a reconnect."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

from sublet._declare.types import EmptyModel
from sublet._worker.context import Context
from sublet._worker.tickets import CLAIM_REPEATED_S
from sublet_protocol import limits
from sublet_protocol.messages import (
    Claim,
    Failed,
    Finished,
    Grant,
    GrantDeclined,
    NoTask,
    Ping,
    Revoked,
    SlotReleased,
    Ticket,
)
from support.virtual_time import in_virtual_time
from support.worker_harness import Runnable, WorkerHarness, client


class Gate:
    """A task that runs until it is let through, and counts itself."""

    def __init__(self, name: str = "gated") -> None:
        self.running: list[str] = []
        self.most = 0
        self.open = asyncio.Event()

        @client.task(name=name)
        async def gated(input: EmptyModel, ctx: Context) -> dict[str, Any]:
            self.running.append(ctx.task_run_id)
            self.most = max(self.most, len(self.running))
            try:
                await self.open.wait()
            finally:
                self.running.remove(ctx.task_run_id)
            return {"by": ctx.worker_id}

        self.task: Runnable = gated


async def test_a_ticket_becomes_a_claim_to_the_scheduler_that_it_names() -> None:
    gate = Gate()
    async with WorkerHarness(gate.task, slots=2) as bench:
        task_run = bench.run(gate.task)
        await bench.until(lambda: gate.running)
        (claim,) = bench.claims
        assert (claim.ticket, claim.worker, claim.pool, claim.kind, claim.redelivered) == (
            "ticket-1",
            bench.worker.id,
            bench.worker.pool,
            "task",
            False,
        )
        keys = [(e, k) for e, k, records in bench.transport.sent if any(isinstance(r, Claim) for r in records)]
        assert keys == [("sublet.inboxes", "scheduler")]
        gate.open.set()
        await bench.until(lambda: bench.transport.acked)
        assert bench.of(Finished)[0].lease == f"{task_run}@1"


async def test_no_task_acknowledges_the_ticket() -> None:
    gate = Gate()
    async with WorkerHarness(gate.task) as bench:
        bench.offer()
        await bench.until(lambda: bench.transport.acked)
        assert bench.transport.taken("task") == 0


async def test_a_retained_ticket_runs_one_task_after_the_other() -> None:
    @client.task(name="quick")
    async def quick(input: EmptyModel, ctx: Context) -> None: ...

    async with WorkerHarness(quick, slots=1) as bench:
        for number in range(5):
            bench.put_up(quick, run=f"run{number}")
        bench.offer()
        await bench.until(lambda: bench.transport.acked)
        assert len(bench.of(Finished)) == 5
        assert all(report.next and report.ticket == "ticket-1" for report in bench.of(Finished))
        assert len(bench.claims) == 1


async def test_reports_for_one_shard_share_a_message_while_one_is_unconfirmed() -> None:
    @client.task(name="quick")
    async def quick(input: EmptyModel, ctx: Context) -> None: ...

    async with WorkerHarness(quick, slots=10) as bench:
        bench.transport.confirming.clear()
        bench.run(quick, run="same")
        await bench.until(lambda: bench.of(Finished))
        for _ in range(5):
            bench.run(quick, run="same")
        await bench.settled()
        bench.transport.confirming.set()
        await bench.until(lambda: len(bench.of(Finished)) == 6)
        sizes = [len(records) for e, _, records in bench.transport.sent if e == "sublet.requests"]
        assert sizes == [1, 5]


@in_virtual_time
async def test_lease_and_ticket_are_held_until_the_end_is_confirmed() -> None:
    gate = Gate()
    async with WorkerHarness(gate.task) as bench:
        task_run = bench.run(gate.task)
        await bench.until(lambda: gate.running)
        bench.transport.failures = 3
        gate.open.set()
        await bench.until(lambda: not gate.running)
        bench.transport.say(Ping())
        await bench.settled()
        assert [held.lease for held in bench.heartbeats[-1].leases] == [f"{task_run}@1"]
        assert not bench.transport.acked
        await bench.until(lambda: bench.transport.acked)
        bench.transport.say(Ping())
        await bench.settled()
        assert bench.heartbeats[-1].leases == ()
        assert len(bench.of(Finished)) == 1


@in_virtual_time
async def test_an_unanswered_claim_is_repeated_to_the_queue_of_the_shard() -> None:
    gate = Gate()
    async with WorkerHarness(gate.task) as bench:
        bench.answering = False
        bench.offer()
        await asyncio.sleep(CLAIM_REPEATED_S * 4)
        keys = [(e, k) for e, k, records in bench.transport.sent if any(isinstance(r, Claim) for r in records)]
        assert keys == [
            ("sublet.inboxes", "scheduler"),
            ("sublet.requests", "bucket.00"),
            ("sublet.requests", "bucket.00"),
        ]
        bench.put_up(gate.task)
        bench.answer("ticket-1")
        await bench.until(lambda: gate.running)


@in_virtual_time
async def test_a_retained_ticket_is_claimed_when_its_report_has_no_answer() -> None:
    gate = Gate()
    async with WorkerHarness(gate.task) as bench:
        bench.run(gate.task)
        await bench.until(lambda: gate.running)
        bench.answering = False
        gate.open.set()
        await bench.until(lambda: len(bench.claims) == 2)
        bench.transport.say(NoTask("ticket-1"))
        await bench.until(lambda: bench.transport.acked)


async def test_the_same_grant_twice_runs_once() -> None:
    gate = Gate()
    async with WorkerHarness(gate.task) as bench:
        bench.run(gate.task)
        await bench.until(lambda: gate.running)
        grant: Grant = next(iter(bench._grants.values()))
        bench.transport.say(Grant(**{**_fields(grant), "ticket": "ticket-1"}))
        await bench.settled()
        assert len(gate.running) == 1
        gate.open.set()
        await bench.until(lambda: bench.transport.acked)
        bench.transport.say(Grant(**{**_fields(grant), "ticket": "ticket-1"}))
        await bench.settled()
        assert len(bench.of(Finished)) == 1


async def test_a_task_that_is_cancelled_before_its_grant_comes_does_not_run() -> None:
    gate = Gate()
    async with WorkerHarness(gate.task) as bench:
        bench.answering = False
        task_run = bench.run(gate.task)
        await bench.until(lambda: bench.claims)
        bench.transport.say(Revoked(bench.lease(task_run), "cancelled"))
        bench.answer("ticket-1")
        await bench.settled()
        assert not gate.running


async def test_a_duplicate_of_a_ticket_is_acknowledged() -> None:
    gate = Gate()
    async with WorkerHarness(gate.task, slots=5) as bench:
        bench.run(gate.task)
        await bench.until(lambda: gate.running)
        bench.transport.offer("task", Ticket("ticket-1", "scheduler", "bucket.00"))
        await bench.until(lambda: bench.transport.acked)
        assert bench.transport.taken("task") == 1


async def test_tasks_of_a_lost_connection_continue_and_adopt_new_tickets() -> None:
    for callback_first in (True, False):
        gate = Gate()
        async with WorkerHarness(gate.task, slots=3) as bench:
            for number in range(2):
                bench.run(gate.task, run=f"run{number}")
            await bench.until(lambda gate=gate: len(gate.running) == 2)  # type: ignore[misc]
            bench.transport.lose_connection(callback_first=callback_first)
            await bench.settled()
            # The two tickets that came again stand for the two tasks: they are held, and claim nothing.
            assert bench.transport.taken("task") == 2
            assert len(bench.claims) == 2
            bench.run(gate.task, run="run2")
            await bench.until(lambda gate=gate: len(gate.running) == 3)  # type: ignore[misc]
            bench.run(gate.task, run="run3")
            await bench.settled()
            assert gate.most == 3
            gate.open.set()
            await bench.until(lambda bench=bench: len(bench.of(Finished)) == 4)  # type: ignore[misc]
            await bench.until(lambda bench=bench: bench.transport.taken("task") == 0)  # type: ignore[misc]
            assert [r.redelivered for r in bench.claims].count(True) == 2


async def test_the_end_of_an_orphan_claims_its_adopted_ticket() -> None:
    gate = Gate()
    async with WorkerHarness(gate.task, slots=1) as bench:
        bench.run(gate.task)
        await bench.until(lambda: gate.running)
        bench.transport.lose_connection()
        bench.put_up(gate.task, run="next")
        await bench.settled()
        assert len(bench.claims) == 1
        gate.open.set()
        await bench.until(lambda: len(bench.of(Finished)) == 2)
        assert bench.of(Finished)[0].ticket is None
        assert not bench.of(Finished)[0].next
        assert gate.most == 1


async def test_two_lost_connections_in_a_row_count_each_orphan_once() -> None:
    gate = Gate()
    async with WorkerHarness(gate.task, slots=2) as bench:
        bench.run(gate.task)
        await bench.until(lambda: gate.running)
        bench.transport.lose_connection()
        await bench.settled()
        bench.transport.lose_connection()
        await bench.settled()
        assert bench.transport.taken("task") == 1
        gate.open.set()
        await bench.until(lambda: bench.transport.taken("task") == 0)
        bench.run(gate.task, run="again")
        await bench.until(lambda: len(bench.of(Finished)) == 2)


async def test_a_grant_for_a_void_ticket_runs_in_a_free_slot_or_is_declined() -> None:
    gate = Gate()
    async with WorkerHarness(gate.task, slots=1) as bench:
        bench.put_up(gate.task, run="one")
        bench.put_up(gate.task, run="two")
        bench.answer("lost-1")
        await bench.until(lambda: gate.running)
        bench.answer("lost-2")
        await bench.until(lambda: bench.of(GrantDeclined))
        assert bench.of(GrantDeclined)[0] == GrantDeclined("two.gated@1", None)
        assert gate.most == 1
        bench.offer()
        await bench.settled()
        assert not bench.claims
        gate.open.set()
        await bench.until(lambda: bench.transport.acked)
        assert len(bench.claims) == 1


async def test_ordinary_and_durable_slots_are_counted_separately() -> None:
    gate = Gate()

    @client.durable_task()
    async def waiting(input: EmptyModel, ctx: Any) -> None:
        await gate.open.wait()

    async with WorkerHarness(gate.task, waiting, slots=1, durable_slots=1) as bench:
        bench.run(gate.task)
        bench.run(waiting)
        await bench.until(lambda: bench.worker.held == {"running": 2})
        assert bench.transport.taken("task") == 1
        assert bench.transport.taken("durable") == 1
        assert {claim.kind for claim in bench.claims} == {"task", "durable"}
        gate.open.set()


# --- release ------------------------------------------------------------------------------------------------------


async def test_a_slot_is_free_when_its_release_is_confirmed_and_the_task_continues() -> None:
    steps: list[str] = []
    resume = asyncio.Event()

    @client.task(name="releasing")
    async def releasing(input: EmptyModel, ctx: Context) -> dict[str, Any]:
        await ctx.aio_release_slot()
        steps.append("released")
        await ctx.aio_release_slot()
        await resume.wait()
        return {"ok": True}

    async with WorkerHarness(releasing, slots=1) as bench:
        bench.transport.confirming.clear()
        task_run = bench.run(releasing)
        await bench.until(lambda: bench.of(SlotReleased))
        await bench.settled()
        assert steps == []
        assert bench.transport.taken("task") == 1
        bench.transport.confirming.set()
        await bench.until(lambda: steps)
        assert bench.transport.taken("task") == 0
        assert bench.worker.held == {"released": 1}
        bench.transport.say(Ping())
        await bench.settled()
        assert [held.lease for held in bench.heartbeats[-1].leases] == [f"{task_run}@1"]
        resume.set()
        await bench.until(lambda: bench.of(Finished))
        assert (bench.of(Finished)[0].ticket, bench.of(Finished)[0].next) == (None, False)
        assert len(bench.of(SlotReleased)) == 1


def releasing_until(resume: asyncio.Event) -> Any:
    """A task that gives its slot away, and then waits."""

    @client.task(name="releasing")
    async def releasing(input: EmptyModel, ctx: Context) -> None:
        await ctx.aio_release_slot()
        await resume.wait()

    return releasing


async def test_an_unconfirmed_release_does_not_free_the_slot() -> None:
    gate = Gate()
    resume = asyncio.Event()
    releasing = releasing_until(resume)
    async with WorkerHarness(releasing, gate.task, slots=1) as bench:
        bench.transport.confirming.clear()
        bench.run(releasing)
        await bench.until(lambda: bench.of(SlotReleased))
        bench.put_up(gate.task, run="next")
        bench.answer("lost")
        await bench.settled()
        assert not gate.running
        bench.transport.confirming.set()
        await bench.until(lambda: bench.of(GrantDeclined))
        resume.set()
        await bench.until(lambda: bench.of(Finished))


async def test_a_released_slot_runs_the_next_task_while_the_first_continues() -> None:
    gate = Gate()
    resume = asyncio.Event()
    releasing = releasing_until(resume)
    async with WorkerHarness(releasing, gate.task, slots=1) as bench:
        bench.run(releasing)
        bench.run(gate.task)
        await bench.until(lambda: gate.running)
        assert bench.worker.held == {"released": 1, "running": 1}
        resume.set()
        await bench.until(lambda: bench.of(Finished))
        assert bench.transport.taken("task") == 1


async def test_release_works_in_sync_code_and_in_async_code_without_await() -> None:
    resume = threading.Event()

    @client.task(name="blocking")
    def blocking(input: EmptyModel, ctx: Context) -> None:
        ctx.release_slot()
        ctx.release_slot()
        resume.wait(20)

    proceed = asyncio.Event()

    @client.task(name="hasty")
    async def hasty(input: EmptyModel, ctx: Context) -> None:
        ctx.release_slot()
        await proceed.wait()

    async with WorkerHarness(blocking, hasty, slots=1) as bench:
        bench.run(blocking)
        bench.run(hasty)
        await bench.until(lambda: bench.worker.held == {"released": 2})
        await bench.until(lambda: bench.transport.taken("task") == 0)
        resume.set()
        proceed.set()
        await bench.until(lambda: len(bench.of(Finished)) == 2)


async def test_a_task_that_ends_before_its_release_is_confirmed_frees_its_slot_once() -> None:
    @client.task(name="hasty")
    async def hasty(input: EmptyModel, ctx: Context) -> None:
        ctx.release_slot()
        await asyncio.sleep(0)

    async with WorkerHarness(hasty, slots=1) as bench:
        for number in range(3):
            bench.run(hasty, run=f"run{number}")
        await bench.until(lambda: len(bench.of(Finished)) == 3)
        await bench.until(lambda: bench.transport.taken("task") == 0)
        assert len(bench.transport.acked) == 3


async def test_the_number_of_released_tasks_is_limited(monkeypatch: Any) -> None:
    monkeypatch.setattr(limits, "RELEASED_MAX_PER_WORKER", 2)
    resume = asyncio.Event()
    releasing = releasing_until(resume)

    async with WorkerHarness(releasing, slots=1) as bench:
        for number in range(4):
            bench.run(releasing, run=f"run{number}")
        await bench.until(lambda: bench.worker.held == {"released": 2, "running": 1})
        await bench.settled()
        assert bench.transport.taken("task") == 1
        resume.set()
        await bench.until(lambda: len(bench.of(Finished)) == 4)
        assert bench.transport.taken("task") == 0


async def test_a_released_task_whose_connection_is_lost_is_no_orphan() -> None:
    resume = asyncio.Event()
    releasing = releasing_until(resume)

    async with WorkerHarness(releasing, slots=1) as bench:
        bench.run(releasing)
        await bench.until(lambda: bench.worker.held == {"released": 1})
        bench.transport.lose_connection()
        bench.run(releasing, run="next")
        await bench.until(lambda: bench.worker.held == {"released": 2})
        resume.set()
        await bench.until(lambda: len(bench.of(Finished)) == 2)
        assert not bench.of(Failed)


def _fields(grant: Grant) -> dict[str, Any]:
    return {name: getattr(grant, name) for name in grant.__struct_fields__}
