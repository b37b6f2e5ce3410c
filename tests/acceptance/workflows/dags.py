"""Workflows of several tasks."""

from __future__ import annotations

from typing import Any

from acceptance.workflows.base import A_MOMENT, AN_HOUR, Named, Number, client, double, ledger
from sublet import Context, DurableContext, EmptyModel, ParentCondition, SleepCondition, UserEventCondition, or_

# --- DAGs -------------------------------------------------------------------------------------------------------------

order = client.workflow(name="order", input_validator=Number)


@order.task()
async def reserve(input: Number, ctx: Context) -> Number:
    ledger.write("reserved")
    await ledger.pass_gate("reserve")
    return Number(n=input.n)


@order.task(
    parents=[reserve],
    wait_for=[SleepCondition("1s"), UserEventCondition("approved", "input.by == 'anna'")],
)
async def ship(input: Number, ctx: Context) -> Number:
    ledger.write("shipped")
    return Number(n=ctx.task_output(reserve).n + 1)


@order.on_success_task()
async def thank(input: Number, ctx: Context) -> None:
    ledger.write("thanked", n=ctx.task_output(ship).n)


maze = client.workflow(name="maze", input_validator=Number)


@maze.task()
async def start(input: Number, ctx: Context) -> Number:
    return input


@maze.task(parents=[start], skip_if=[ParentCondition(start, "output.n > 10")])
async def low(input: Number, ctx: Context) -> Number:
    return Number(n=1)


@maze.task(parents=[start], skip_if=[ParentCondition(start, "output.n <= 10")])
async def high(input: Number, ctx: Context) -> Number:
    return Number(n=2)


@maze.task(parents=[start], cancel_if=[ParentCondition(start, "output.n == 13")])
async def unlucky(input: Number, ctx: Context) -> Number:
    return Number(n=3)


@maze.task(
    parents=[start], wait_for=[or_(SleepCondition(AN_HOUR), UserEventCondition("shortcut"), SleepCondition("1s"))]
)
async def detour(input: Number, ctx: Context) -> Number:
    return Number(n=4)


@maze.task(parents=[low, high, detour])
async def exit_(input: Number, ctx: Context) -> dict[str, Any]:
    skipped = [task.name for task in (low, high, detour) if ctx.was_skipped(task)]
    try:
        ctx.task_output(low if "low" in skipped else high)
    except ValueError as error:
        return {"skipped": skipped, "error": str(error)}
    return {"skipped": skipped}


@maze.task(parents=[unlucky])
async def after_unlucky(input: Number, ctx: Context) -> Number:
    return Number(n=5)


wreck = client.workflow(name="wreck", input_validator=Named)


@wreck.task()
async def hull(input: Named, ctx: Context) -> None:
    raise ValueError("a leak")


@wreck.task()
async def mast(input: Named, ctx: Context) -> None:
    await ledger.pass_gate("mast")
    raise ValueError("a crack")


@wreck.task(parents=[hull])
async def cargo(input: Named, ctx: Context) -> None:
    ledger.write("loaded")


@wreck.on_failure_task()
async def rescue(input: Named, ctx: Context) -> dict[str, Any]:
    ledger.write("rescued", errors=sorted(ctx.task_run_errors))
    return {"first": str(ctx.get_task_run_error(hull))}


wreck_in_port = client.workflow(name="wreck-in-port")


@wreck_in_port.task()
async def anchor(input: EmptyModel, ctx: Context) -> None:
    ledger.write("anchored")
    await ledger.pass_gate("anchor")


@wreck_in_port.on_failure_task()
async def rescue_in_vain(input: EmptyModel, ctx: Context) -> None:
    ledger.write("rescued")


# --- load -------------------------------------------------------------------------------------------------------------

voyage = client.workflow(name="voyage", input_validator=Number)


@voyage.task()
async def embark(input: Number, ctx: Context) -> Number:
    ledger.write("embarked", n=input.n)
    return input


@voyage.durable_task(parents=[embark])
async def sail(input: Number, ctx: DurableContext) -> Number:
    await ctx.aio_sleep_for(A_MOMENT)
    doubled = await double.aio_run(input)
    await ctx.aio_sleep_for(A_MOMENT)
    ledger.write("sailed", n=input.n)
    return doubled


@voyage.task(parents=[sail])
async def land(input: Number, ctx: Context) -> Number:
    ledger.write("landed", n=input.n)
    return ctx.task_output(sail)


retrace = client.workflow(name="retrace")


@retrace.task()
async def first_step(input: EmptyModel, ctx: Context) -> Number:
    ledger.write("step", number=1)
    return Number(n=1)


@retrace.task(parents=[first_step])
async def second_step(input: EmptyModel, ctx: Context) -> Number:
    """Fails unless its gate is open."""
    ledger.write("step", number=2)
    if not ledger.is_open("second step"):
        raise ValueError("there is a wall")
    return Number(n=ctx.task_output(first_step).n + 1)


@retrace.task(parents=[second_step])
async def third_step(input: EmptyModel, ctx: Context) -> Number:
    ledger.write("step", number=3)
    return Number(n=ctx.task_output(second_step).n + 1)
