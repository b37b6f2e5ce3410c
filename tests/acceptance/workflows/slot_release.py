"""Tasks that give their slot away and go on."""

from __future__ import annotations

import asyncio

from pydantic import BaseModel

from acceptance.workflows.base import Named, Where, client, journal
from sublet import Context, DurableContext, NonRetryableException


class Release(BaseModel):
    """``then``: what the task does once its slot is free."""

    name: str = ""
    then: str = "return"


@client.task(input_validator=Release, retries=1, execution_timeout="5m")
async def release(input: Release, ctx: Context) -> Where:
    journal.write("release began", name=input.name, attempt=ctx.attempt_number, worker=ctx.worker_id)
    await ctx.aio_release_slot()
    journal.write("slot released", name=input.name)
    await journal.pass_gate(input.name)
    if input.then == "fail for good":
        raise NonRetryableException("no use")
    if input.then == "fail once" and ctx.retry_count == 0:
        raise ValueError("not yet")
    if input.then == "release again":
        await ctx.aio_release_slot()
        ctx.release_slot()
    return Where(worker=ctx.worker_id, invocations=ctx.attempt_number)


@client.task(input_validator=Named, execution_timeout="5m")
def release_in_a_thread(input: Named, ctx: Context) -> Where:
    ctx.release_slot()
    journal.write("slot released", name=input.name)
    journal.pass_gate_blocking(input.name)
    return Where(worker=ctx.worker_id)


@client.task(input_validator=Named, execution_timeout="3s")
async def release_for_too_long(input: Named, ctx: Context) -> None:
    await ctx.aio_release_slot()
    journal.write("slot released", name=input.name)
    try:
        await asyncio.Event().wait()
    finally:
        journal.write("stopped", name=input.name)


@client.durable_task(input_validator=Named, execution_timeout="5m")
async def release_and_wait(input: Named, ctx: DurableContext) -> Where:
    """Goes on without its slot, and then lets go of its worker too."""
    await ctx.aio_release_slot()
    journal.write("slot released", name=input.name, invocation=ctx.invocation_count)
    await journal.pass_gate(input.name)
    await ctx.aio_wait_for_event("leave")
    return Where(worker=ctx.worker_id, invocations=ctx.invocation_count)
