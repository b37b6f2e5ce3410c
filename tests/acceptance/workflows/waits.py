"""Durable tasks that wait."""

from __future__ import annotations

import asyncio
from datetime import datetime, timedelta
from typing import Any

from pydantic import BaseModel

from acceptance.workflows.base import A_MOMENT, AN_HOUR, Named, Number, Where, charge, client, double, journal
from sublet import DurableContext, EmptyModel, EvictionPolicy, SleepCondition, UserEventCondition, or_

# --- durable tasks: waiting -------------------------------------------------------------------------------------------


@client.durable_task(input_validator=Named, execution_timeout="5m")
async def durable_work(input: Named, ctx: DurableContext) -> Where:
    """Takes its durable slot until its gate opens."""
    journal.write("durable work began", name=input.name)
    await journal.pass_gate(input.name)
    return Where(worker=ctx.worker_id, invocations=ctx.invocation_count)


class Nap(BaseModel):
    seconds: float
    name: str = ""


@client.durable_task(input_validator=Nap)
async def nap(input: Nap, ctx: DurableContext) -> Where:
    journal.write("nap began", name=input.name)
    await ctx.aio_sleep_for(timedelta(seconds=input.seconds))
    journal.write("nap ended", name=input.name)
    return Where(worker=ctx.worker_id, invocations=ctx.invocation_count)


@client.durable_task()
async def greet(input: EmptyModel, ctx: DurableContext) -> Where:
    """Waits for nothing."""
    return Where(worker=ctx.worker_id, invocations=ctx.invocation_count)


class Journey(BaseModel):
    workers: list[str]
    receipt: int
    doubled: int
    answer: dict[str, Any]
    began_at: datetime


@client.durable_task(input_validator=Named, execution_timeout="5m")
async def journey(input: Named, ctx: DurableContext) -> Journey:
    """One of every operation, then an event, then work behind a gate, then a sleep."""
    journal.write("journey invoked", worker=ctx.worker_id)
    began_at = await ctx.aio_now()
    receipt = await ctx.aio_memo(charge, Number, input.name)
    doubled = await double.aio_run(Number(n=21))
    answer = await ctx.aio_wait_for_event("answer")
    journal.write("journey answered")
    await journal.pass_gate("journey")
    await ctx.aio_sleep_for(A_MOMENT)
    return Journey(
        workers=journal.values("journey invoked", "worker"),
        receipt=receipt.n,
        doubled=doubled.n,
        answer=answer,
        began_at=began_at,
    )


@client.durable_task(input_validator=Number)
async def fan_out(input: Number, ctx: DurableContext) -> Number:
    children = [double.create_bulk_run_item(Number(n=i)) for i in range(input.n)]
    results = await double.aio_run_many(children)
    assert [result.n for result in results] == [2 * i for i in range(input.n)], "results are in the order of requests"
    return Number(n=sum(result.n for result in results))


class Clockwork(BaseModel):
    same_moment: bool
    moments_differ: bool
    both: list[str]
    either: list[str]
    nothing: None
    slept_s: float


def nothing() -> None:
    journal.write("nothing computed")


@client.durable_task()
async def clockwork(input: EmptyModel, ctx: DurableContext) -> Clockwork:
    """Every kind of wait, with an eviction between one and the next."""
    first = await ctx.aio_now()
    await ctx.aio_sleep_for(A_MOMENT)
    await ctx.aio_sleep_for(A_MOMENT)
    second = await ctx.aio_now()
    journal.write("clock read", first=first.isoformat(), second=second.isoformat())
    computed = await ctx.aio_memo(nothing, type(None))  # type: ignore[func-returns-value]  # what it is about
    slept = await ctx.aio_sleep_until(second + timedelta(seconds=1))
    both = await ctx.aio_wait_for("both", SleepCondition(A_MOMENT, "short"), SleepCondition("300ms", "long"))
    either = await ctx.aio_wait_for(
        "either", or_(SleepCondition(A_MOMENT, "soon"), SleepCondition(AN_HOUR, "late"), UserEventCondition("never"))
    )
    firsts = {entry["first"] for entry in journal.entries("clock read")}
    return Clockwork(
        same_moment=len(firsts) == 1,
        moments_differ=first < second,
        both=sorted(both["CREATE"]),
        either=sorted(either["CREATE"]),
        nothing=computed,
        slept_s=slept.duration.total_seconds(),
    )


# --- durable tasks: staying and leaving -------------------------------------------------------------------------------


@client.durable_task(input_validator=Named, eviction_policy=None)
async def stay(input: Named, ctx: DurableContext) -> Where:
    """Never leaves its worker but when that is stopped."""
    journal.write("stay invoked", worker=ctx.worker_id)
    await ctx.aio_wait_for_event("leave", f"input.name == '{input.name}'")
    return Where(worker=ctx.worker_id, invocations=ctx.invocation_count)


@client.durable_task(input_validator=Named, eviction_policy=EvictionPolicy(ttl=None))
async def make_way(input: Named, ctx: DurableContext) -> Where:
    """Leaves when others need its slot."""
    journal.write("make way invoked", name=input.name)
    await ctx.aio_wait_for_event("leave", f"input.name == '{input.name}'")
    return Where(worker=ctx.worker_id, invocations=ctx.invocation_count)


@client.durable_task()
async def stubborn(input: EmptyModel, ctx: DurableContext) -> dict[str, str]:
    """Catches everything, also what drops it from its worker."""
    journal.write("stubborn invoked")
    try:
        await ctx.aio_wait_for_event("leave")
    except BaseException as error:
        journal.write("stubborn caught", type=type(error).__name__)
        return {"result": "a lie"}
    return {"result": "the truth"}


# --- durable tasks: branches ------------------------------------------------------------------------------------------


async def _wait_in_branch(ctx: DurableContext, name: str, order: list[str]) -> None:
    await ctx.aio_wait_for_event("branch", f"input.name == '{name}'")
    order.append(name)
    await ctx.aio_sleep_for(A_MOMENT)
    await ctx.aio_memo(charge, Number, name)


@client.durable_task()
async def gathered(input: EmptyModel, ctx: DurableContext) -> dict[str, list[str]]:
    order: list[str] = []
    try:
        await asyncio.gather(*(_wait_in_branch(ctx, name, order) for name in "abc"))
    finally:
        journal.write("branches went on", order=order)
    return {"order": order}


@client.durable_task()
async def grouped(input: EmptyModel, ctx: DurableContext) -> dict[str, list[str]]:
    order: list[str] = []
    try:
        async with asyncio.TaskGroup() as group:
            for name in "abc":
                group.create_task(_wait_in_branch(ctx, name, order))
    finally:
        journal.write("branches went on", order=order)
    return {"order": order}


@client.durable_task(execution_timeout="5m")
async def half_busy(input: EmptyModel, ctx: DurableContext) -> Where:
    """One branch waits, the other works."""

    async def wait() -> None:
        await ctx.aio_wait_for_event("call")
        journal.write("call heard")

    async def toil() -> None:
        journal.write("toil began")
        await journal.pass_gate("toil")
        journal.write("toil ended")

    await asyncio.gather(wait(), toil())
    return Where(worker=ctx.worker_id, invocations=ctx.invocation_count)
