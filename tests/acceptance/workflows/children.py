"""Durable tasks with children."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from acceptance.workflows.base import Named, Number, client, double, journal, work
from sublet import Context, DurableContext, EmptyModel, TaskRunError


@client.task()
async def break_down(input: EmptyModel, ctx: Context) -> None:
    journal.write("broke down")
    raise ValueError("the engine smokes")


pair = client.workflow(name="pair", input_validator=Number)


@pair.task()
async def left(input: Number, ctx: Context) -> Number:
    return Number(n=input.n + 1)


@pair.task(parents=[left])
async def right(input: Number, ctx: Context) -> Number:
    return Number(n=ctx.task_output(left).n * 10)


class Family(BaseModel):
    failure: str
    failure_again: str
    pair: dict[str, Any]
    twins: int
    mixed: list[str]
    left_alone: str


@client.durable_task()
async def family(input: EmptyModel, ctx: DurableContext) -> Family:
    """Children of every fate."""
    failures = []
    for _ in range(2):
        try:
            await break_down.aio_run()
        except TaskRunError as error:
            failures.append(f"{error.exc_type}: {error.exc}")
    dag = await pair.aio_run(Number(n=1))
    for _ in range(2):
        await double.aio_run(Number(n=100), child_key="the one")
    items = [double.create_bulk_run_item(Number(n=3)), break_down.create_bulk_run_item()]
    mixed = await double.aio_run_many(items, return_exceptions=True)
    alone = await double.aio_run(Number(n=4), wait_for_result=False)
    return Family(
        failure=failures[0],
        failure_again=failures[1],
        pair=dag,
        twins=journal.count("doubled", n=100),
        mixed=[type(each).__name__ for each in mixed],
        left_alone=alone.workflow_run_id,
    )


@client.durable_task()
async def guardian(input: EmptyModel, ctx: DurableContext) -> dict[str, str]:
    try:
        await work.aio_run(Named(name="ward"))
    except TaskRunError as error:
        return {"ended": error.exc_type}
    return {"ended": "well"}


@client.task(retries=1)
async def foster(input: EmptyModel, ctx: Context) -> dict[str, list[int]]:
    """An ordinary task with children: two by place, one by key. Its second attempt succeeds."""
    places = [double.create_bulk_run_item(Number(n=n)) for n in (1, 2)]
    found = [*await double.aio_run_many(places), await double.aio_run(Number(n=3), child_key="third")]
    if ctx.retry_count == 0:
        raise RuntimeError("overslept")
    return {"found": [child.n for child in found]}


@client.task(retries=1)
def foster_in_a_thread(input: EmptyModel, ctx: Context) -> dict[str, list[int]]:
    found = [double.run(Number(n=n)) for n in (1, 2)]
    if ctx.retry_count == 0:
        raise RuntimeError("overslept")
    return {"found": [child.n for child in found]}
