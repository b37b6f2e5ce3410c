"""The workflows that are measured, and the worker that runs them (``sublet-worker benchmarks.workloads:worker``)."""

from __future__ import annotations

import os
import time
from datetime import UTC, datetime, timedelta

from pydantic import BaseModel

from sublet import Context, DurableContext, EmptyModel, Sublet

client = Sublet()


class Number(BaseModel):
    n: int = 0


class Moment(BaseModel):
    """``at``: Unix seconds."""

    at: float


@client.task(name="bench-noop", input_validator=Number)
async def noop(input: Number, ctx: Context) -> Number:
    return input


chain = client.workflow(name="bench-chain", input_validator=Number)


@chain.task()
async def first(input: Number, ctx: Context) -> Number:
    return input


@chain.task(parents=[first])
async def second(input: Number, ctx: Context) -> Number:
    return ctx.task_output(first)


@chain.task(parents=[second])
async def third(input: Number, ctx: Context) -> Number:
    return ctx.task_output(second)


@client.durable_task(name="bench-wake", input_validator=Number, execution_timeout=timedelta(minutes=10))
async def wake(input: Number, ctx: DurableContext) -> dict[str, float]:
    """Seconds from the publishing of the event until the code continues."""
    event = await ctx.aio_wait_for_event("bench.wake", f"input.n == {input.n}")
    return {"latency_s": time.time() - event["sent_at"]}


@client.durable_task(name="bench-sleep", input_validator=Moment, execution_timeout=timedelta(minutes=10))
async def sleep_until(input: Moment, ctx: DurableContext) -> dict[str, float]:
    """Seconds from the due time until the code continues."""
    await ctx.aio_sleep_until(datetime.fromtimestamp(input.at, UTC))
    return {"late_s": time.time() - input.at}


@client.durable_task(name="bench-fan-out", input_validator=Number, execution_timeout=timedelta(minutes=10))
async def fan_out(input: Number, ctx: DurableContext) -> Number:
    children = [noop.create_bulk_run_item(Number(n=n)) for n in range(input.n)]
    return Number(n=sum(child.n for child in await noop.aio_run_many(children)))


@client.task(name="bench-ready")
async def ready(input: EmptyModel, ctx: Context) -> None:
    """The worker answers."""


worker = client.worker(
    "bench",
    slots=int(os.environ.get("BENCH_SLOTS", "100")),
    durable_slots=int(os.environ.get("BENCH_DURABLE_SLOTS", "100")),
    workflows=[noop, chain, wake, sleep_until, fan_out, ready],
)
