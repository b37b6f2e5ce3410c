"""A web front end: start a run, ask for its result, and a webhook that tells the waiting run of a payment.

How to run it, with `pip install fastapi uvicorn` (README.md says more):

    sublet-worker web_app:worker &
    uvicorn web_app:app &
    curl localhost:8000/orders --json '{"item": "book", "cents": 1200}'
    curl localhost:8000/webhooks/payments --json '{"order_id": "<order>", "cents": 1200}'
    curl localhost:8000/orders/<order>
"""

from datetime import UTC, datetime, timedelta
from typing import Literal
from uuid import UUID

from fastapi import FastAPI, HTTPException
from pydantic import BaseModel

from sublet import DurableContext, RunNotFoundError, RunStatus, SleepCondition, Sublet, UserEventCondition, or_

sublet = Sublet()
app = FastAPI()


class Cart(BaseModel):
    item: str
    cents: int


class Order(Cart):
    ordered_at: datetime
    pay_within: timedelta = timedelta(days=14)


class Payment(BaseModel):
    order_id: UUID
    cents: int


class Shipment(BaseModel):
    outcome: Literal["shipped", "cancelled"]


class View(BaseModel):
    order_id: UUID
    status: RunStatus
    result: Shipment | None = None


@sublet.durable_task(input_validator=Order, schedule_timeout="7d")
async def ship_when_paid(input: Order, ctx: DurableContext) -> Shipment:
    paid = UserEventCondition(
        "payment.received",
        f"input.cents >= {input.cents}",
        scope=ctx.workflow_run_id,  # only payments of this order
        consider_events_since=input.ordered_at,  # the payment may be faster than the worker
    )
    done = await ctx.aio_wait_for("payment", or_(paid, SleepCondition(input.pay_within)))
    return Shipment(outcome="shipped" if "payment.received" in done["CREATE"] else "cancelled")


worker = sublet.worker("orders", workflows=[ship_when_paid])


@app.post("/orders", status_code=202)
async def start(cart: Cart) -> View:
    order = Order(item=cart.item, cents=cart.cents, ordered_at=datetime.now(UTC))
    run = await ship_when_paid.aio_run(order, wait_for_result=False)
    return View(order_id=UUID(run.workflow_run_id), status=RunStatus.QUEUED)


@app.get("/orders/{order_id}")
async def look(order_id: UUID) -> View:
    try:
        status = await sublet.runs.aio_get_status(str(order_id))
    except RunNotFoundError:
        raise HTTPException(404) from None
    done = status is RunStatus.COMPLETED
    result = await ship_when_paid.get_run_ref(str(order_id)).aio_result() if done else None
    return View(order_id=order_id, status=status, result=result)


@app.post("/webhooks/payments", status_code=204)
async def payment_received(payment: Payment) -> None:
    """First check the signature of your payment provider."""
    await sublet.event.aio_push("payment.received", {"cents": payment.cents}, scope=str(payment.order_id))
