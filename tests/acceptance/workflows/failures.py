"""Tasks that fail, take too long, or return what cannot be stored."""

from __future__ import annotations

import asyncio
from typing import Any

from acceptance.workflows.base import A_MOMENT, Named, Number, Where, charge, client, journal
from sublet import Context, DurableContext, EmptyModel, NonRetryableException


@client.task(input_validator=Number, retries=3, backoff_factor=1.1, backoff_max_seconds=1)
async def fail_until(input: Number, ctx: Context) -> Number:
    """Succeeds with attempt ``n``."""
    journal.write("attempt", number=ctx.attempt_number, of=ctx.max_attempts)
    if ctx.attempt_number < input.n:
        raise RuntimeError(f"attempt {ctx.attempt_number} failed")
    return Number(n=ctx.attempt_number)


@client.task(retries=5)
async def give_up(input: EmptyModel, ctx: Context) -> None:
    journal.write("attempt")
    raise NonRetryableException("pointless")


@client.task()
async def fail_silently(input: EmptyModel, ctx: Context) -> None:
    raise KeyError


@client.task(execution_timeout="1s")
async def take_too_long(input: EmptyModel, ctx: Context) -> None:
    try:
        await asyncio.Event().wait()
    finally:
        journal.write("stopped")


@client.task(input_validator=Named, execution_timeout="1s")
def block_too_long(input: Named, ctx: Context) -> dict[str, bool]:
    journal.pass_gate_blocking(input.name)
    journal.write("noticed", cancelled=ctx.is_cancelled)
    return {"late": True}


@client.task(execution_timeout="1s")
async def ask_for_time(input: EmptyModel, ctx: Context) -> dict[str, bool]:
    await ctx.aio_refresh_timeout("1m")
    await asyncio.sleep(4)
    return {"in_time": True}


@client.durable_task(execution_timeout="2s")
async def think_between_naps(input: EmptyModel, ctx: DurableContext) -> Where:
    """Waits far longer than its timeout, and works less."""
    await ctx.aio_sleep_for("5s")
    await ctx.aio_sleep_for("200ms")
    return Where(worker=ctx.worker_id, invocations=ctx.invocation_count)


@client.durable_task(execution_timeout="2s")
async def nap_then_toil(input: EmptyModel, ctx: DurableContext) -> None:
    await ctx.aio_sleep_for(A_MOMENT)
    await asyncio.Event().wait()


@client.durable_task(retries=2)
async def stumble(input: EmptyModel, ctx: DurableContext) -> Number:
    """Fails between its operations: what was recorded is not done again."""
    receipt = await ctx.aio_memo(charge, Number, "stumble")
    await ctx.aio_sleep_for(A_MOMENT)
    if ctx.retry_count < 2:
        raise RuntimeError("stumbled")
    return receipt


@client.task(schedule_timeout="2s", input_validator=Named)
async def be_quick_or_never(input: Named, ctx: Context) -> None:
    journal.write("was quick")


@client.task()
async def cancel_myself(input: EmptyModel, ctx: Context) -> None:
    await ctx.aio_cancel()
    await asyncio.Event().wait()


@client.task()
async def return_a_socket(input: EmptyModel, ctx: Context) -> dict[str, Any]:
    return {"socket": object()}


@client.task(input_validator=Number)
async def return_much(input: Number, ctx: Context) -> dict[str, str]:
    return {"much": "x" * input.n}


@client.task()  # type: ignore[type-var]  # type checkers see it too
async def return_a_number(input: EmptyModel, ctx: Context) -> int:
    return 42
