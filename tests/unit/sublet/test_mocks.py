"""`mock_run`: calls the function of a task without a worker."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from sublet import Context, DurableContext, EmptyModel, Sublet


class Order(BaseModel):
    id: int = 7


sublet = Sublet()
workflow = sublet.workflow(name="flow", input_validator=Order)


@sublet.task(input_validator=Order)
def plain(input: Order, ctx: Context) -> dict[str, Any]:
    ctx.release_slot()
    ctx.refresh_timeout(timedelta(seconds=1))
    ctx.cancel()
    current = sublet.current_context
    return {"id": input.id, "run": ctx.workflow_run_id[:5], "same": current is ctx, "cancelled": ctx.is_cancelled}


@workflow.task()
async def first(input: Order, ctx: Context) -> dict[str, int]:
    return {"n": 1}


@workflow.task(parents=[first], retries=3)
async def second(input: Order, ctx: Context, *, gate: str = "") -> dict[str, Any]:
    await ctx.aio_release_slot()
    seen = {"parent": ctx.task_output(first), "metadata": ctx.additional_metadata, "pool": ctx.lifespan}
    return {**seen, "attempt": ctx.attempt_number, "gate": gate}


@sublet.durable_task()
async def durable(input: EmptyModel, ctx: DurableContext) -> dict[str, Any]:
    return {"zone": str((await ctx.aio_now()).tzinfo), "length": await ctx.aio_memo(len, int, "four")}


@sublet.durable_task()
async def sleeper(input: EmptyModel, ctx: DurableContext) -> None:
    await ctx.aio_sleep_for(timedelta(seconds=1))


def test_mock_run_calls_a_sync_function_with_a_context_without_a_worker() -> None:
    assert plain.mock_run(Order(id=3)) == {"id": 3, "run": "mock-", "same": True, "cancelled": True}
    assert plain.mock_run() == {"id": 7, "run": "mock-", "same": True, "cancelled": True}
    assert sublet.current_context is None


async def test_the_mock_context_has_the_given_values() -> None:
    shown = await second.aio_mock_run(
        Order(),
        additional_metadata={"by": "test"},
        parent_outputs={"first": {"n": 5}},
        retry_count=2,
        lifespan="pool",
        dependencies={"gate": "open"},
    )
    assert shown == {"parent": {"n": 5}, "metadata": {"by": "test"}, "pool": "pool", "attempt": 3, "gate": "open"}


async def test_a_durable_task_knows_the_time_but_cannot_wait() -> None:
    assert await durable.aio_mock_run() == {"zone": "UTC", "length": 4}
    with pytest.raises(ValueError, match="cannot wait"):
        await sleeper.aio_mock_run()


async def test_the_kind_of_function_and_the_input_are_checked() -> None:
    with pytest.raises(TypeError, match="aio_mock_run"):
        durable.mock_run()
    with pytest.raises(TypeError, match="mock_run"):
        await plain.aio_mock_run()
    with pytest.raises(ValidationError):
        plain.mock_run({"id": "x"})  # type: ignore[arg-type]
