"""The types that mypy infers: mypy checks this file. Running it shows that the declarations are valid."""

from __future__ import annotations

from typing import Any, assert_type

from pydantic import BaseModel

from sublet import (
    ClientConfig,
    Context,
    DurableContext,
    EmptyModel,
    Standalone,
    Sublet,
    Task,
    TaskRunRef,
    Workflow,
    WorkflowRunRef,
)
from support.fake_transport import client, echo


class Order(BaseModel):
    id: int = 1


class Receipt(BaseModel):
    id: int = 1


sublet = Sublet(ClientConfig())
flow = sublet.workflow(name="flow", input_validator=Order)
plain = sublet.workflow(name="plain")


@sublet.task(input_validator=Order)
def charge(input: Order, ctx: Context) -> Receipt:
    return Receipt(id=input.id)


@sublet.task(input_validator=Order)
async def aio_charge(input: Order, ctx: Context) -> Receipt:
    return Receipt(id=input.id)


@sublet.durable_task(input_validator=Order)
async def ship(input: Order, ctx: DurableContext) -> dict[str, str]:
    assert_type(await charge.aio_run(input), Receipt)
    return {}


@sublet.task()
async def nothing(input: EmptyModel, ctx: Context) -> None: ...


@flow.task()
def first(input: Order, ctx: Context) -> Receipt:
    return Receipt(id=input.id)


@flow.task(parents=[first])
async def second(input: Order, ctx: Context) -> dict[str, int]:
    assert_type(ctx.task_output(first), Receipt)
    return {}


@flow.durable_task(parents=[second])
async def third(input: Order, ctx: DurableContext) -> Receipt:
    return Receipt()


@flow.on_failure_task()
async def undo(input: Order, ctx: Context) -> None: ...


def test_declarations_keep_their_types() -> None:
    assert_type(charge, Standalone[Order, Receipt])
    assert_type(aio_charge, Standalone[Order, Receipt])
    assert_type(ship, Standalone[Order, dict[str, str]])
    assert_type(nothing, Standalone[EmptyModel, None])
    assert_type(flow, Workflow[Order])
    assert_type(plain, Workflow[EmptyModel])
    assert_type(first, Task[Order, Receipt])
    assert_type(second, Task[Order, dict[str, int]])
    assert_type(third, Task[Order, Receipt])
    assert_type(undo, Task[Order, None])
    assert len(flow.spec().tasks) == 4


async def test_results_have_the_type_of_the_function() -> None:
    local, _ = client(echo)
    stub = local.stubs.task(name="charge", input_validator=Order, output_validator=Receipt)
    assert_type(stub, Standalone[Order, Receipt])
    assert_type(stub.run(Order()), Receipt)
    assert_type(await stub.aio_run(Order()), Receipt)
    assert_type(stub.run(Order(), wait_for_result=False), TaskRunRef[Order, Receipt])
    assert_type(await stub.aio_run(Order(), wait_for_result=False), TaskRunRef[Order, Receipt])
    items = [stub.create_bulk_run_item(Order())]
    assert_type(stub.run_many(items), list[Receipt])
    assert_type(await stub.aio_run_many(items), list[Receipt])
    assert_type(await stub.aio_run_many(items, return_exceptions=True), list[Receipt | BaseException])
    assert_type(await stub.aio_run_many(items, wait_for_result=False), list[TaskRunRef[Order, Receipt]])
    workflow = local.stubs.workflow(name="flow", input_validator=Order)
    assert_type(await workflow.aio_run(Order()), dict[str, Any])
    assert_type(await workflow.aio_run(Order(), wait_for_result=False), WorkflowRunRef)
    local.close()
