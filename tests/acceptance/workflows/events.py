"""Tasks that wait for events, or are started by them."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from acceptance.workflows.base import A_MOMENT, AN_HOUR, Named, Number, client, journal
from sublet import Context, DefaultFilter, DurableContext, EmptyModel, UserEventCondition


@client.durable_task(input_validator=Number)
async def collect(input: Number, ctx: DurableContext) -> dict[str, list[int]]:
    """``n`` waits for the same key, one after the other."""
    await ctx.aio_sleep_for(A_MOMENT)
    journal.write("collecting")
    await journal.pass_gate("collect")
    return {"seen": [(await ctx.aio_wait_for_event("count"))["n"] for _ in range(input.n)]}


class Paid(BaseModel):
    order: int
    amount: float


@client.durable_task(input_validator=Number)
async def await_payment(input: Number, ctx: DurableContext) -> Paid:
    journal.write("awaiting", n=input.n)
    paid = await ctx.aio_wait_for_event("paid", f"input.order == {input.n}", payload_validator=Paid)
    assert isinstance(paid, Paid)
    return paid


@client.durable_task(input_validator=Named)
async def hear_scope(input: Named, ctx: DurableContext) -> dict[str, Any]:
    return await ctx.aio_wait_for("scoped", UserEventCondition("said", scope=input.name))


@client.durable_task(input_validator=Named)
async def look_back(input: Named, ctx: DurableContext) -> dict[str, Any]:
    return await ctx.aio_wait_for_event("said", scope=input.name, lookback_window=AN_HOUR)


@client.task(input_validator=Number, on_events=["number.*"])
async def on_number(input: Number, ctx: Context) -> Number:
    journal.write("triggered", n=input.n, key=ctx.triggering_event_key, metadata=ctx.additional_metadata)
    return input


@client.task(
    input_validator=Number,
    on_events=["measured"],
    default_filters=[
        DefaultFilter(expression="input.n > payload.above", scope="plant", payload={"above": 10}),
        DefaultFilter(expression="input.n > payload.above", scope="plant", payload={"above": 20}),
    ],
)
async def on_measured(input: Number, ctx: Context) -> Number:
    journal.write("measured", n=input.n, above=ctx.filter_payload["above"])
    return input


@client.task(input_validator=Number, on_events=["count"])
async def on_count(input: Number, ctx: Context) -> None:
    journal.write("counted", n=input.n)


@client.durable_task()
async def await_badly(input: EmptyModel, ctx: DurableContext) -> None:
    await ctx.aio_wait_for_event("paid", "input.order ==")
