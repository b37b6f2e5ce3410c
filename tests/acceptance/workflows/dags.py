"""Workflows of several tasks."""

from __future__ import annotations

from typing import Any

from acceptance.workflows.base import A_MOMENT, AN_HOUR, Named, Number, client, double, journal
from sublet import Context, DurableContext, EmptyModel, ParentCondition, SleepCondition, UserEventCondition, or_

# --- DAGs -------------------------------------------------------------------------------------------------------------

order = client.workflow(name="order", input_validator=Number)


@order.task()
async def reserve(input: Number, ctx: Context) -> Number:
    journal.write("reserved")
    await journal.pass_gate("reserve")
    return Number(n=input.n)


@order.task(
    parents=[reserve],
    wait_for=[SleepCondition("1s"), UserEventCondition("approved", "input.by == 'anna'")],
)
async def ship(input: Number, ctx: Context) -> Number:
    journal.write("shipped")
    return Number(n=ctx.task_output(reserve).n + 1)


@order.on_success_task()
async def thank(input: Number, ctx: Context) -> None:
    journal.write("thanked", n=ctx.task_output(ship).n)


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
    await journal.pass_gate("mast")
    raise ValueError("a crack")


@wreck.task(parents=[hull])
async def cargo(input: Named, ctx: Context) -> None:
    journal.write("loaded")


@wreck.on_failure_task()
async def rescue(input: Named, ctx: Context) -> dict[str, Any]:
    journal.write("rescued", errors=sorted(ctx.task_run_errors))
    return {"first": str(ctx.get_task_run_error(hull))}


wreck_in_port = client.workflow(name="wreck-in-port")


@wreck_in_port.task()
async def anchor(input: EmptyModel, ctx: Context) -> None:
    journal.write("anchored")
    await journal.pass_gate("anchor")


@wreck_in_port.on_failure_task()
async def rescue_in_vain(input: EmptyModel, ctx: Context) -> None:
    journal.write("rescued")


# --- load -------------------------------------------------------------------------------------------------------------

durable_dag = client.workflow(name="durable_dag", input_validator=Number)


@durable_dag.task()
async def begin(input: Number, ctx: Context) -> Number:
    journal.write("started", n=input.n)
    return input


@durable_dag.durable_task(parents=[begin])
async def sleep_and_double(input: Number, ctx: DurableContext) -> Number:
    await ctx.aio_sleep_for(A_MOMENT)
    doubled = await double.aio_run(input)
    await ctx.aio_sleep_for(A_MOMENT)
    journal.write("slept", n=input.n)
    return doubled


@durable_dag.task(parents=[sleep_and_double])
async def finish(input: Number, ctx: Context) -> Number:
    journal.write("finished", n=input.n)
    return ctx.task_output(sleep_and_double)


retrace = client.workflow(name="retrace")


@retrace.task()
async def first_step(input: EmptyModel, ctx: Context) -> Number:
    journal.write("step", number=1)
    return Number(n=1)


@retrace.task(parents=[first_step])
async def second_step(input: EmptyModel, ctx: Context) -> Number:
    """Fails unless its gate is open."""
    journal.write("step", number=2)
    if not journal.is_open("second step"):
        raise ValueError("there is a wall")
    return Number(n=ctx.task_output(first_step).n + 1)


@retrace.task(parents=[second_step])
async def third_step(input: EmptyModel, ctx: Context) -> Number:
    journal.write("step", number=3)
    return Number(n=ctx.task_output(second_step).n + 1)
