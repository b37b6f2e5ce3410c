"""The workflows of the demo, and the worker that runs them: ``sublet-worker demo_workflows:worker``.

Tasks return when they began and ended (Unix seconds) and in which process, so that the demo can check its claims from
their outputs.
"""

from __future__ import annotations

import asyncio
import os
import time
from datetime import timedelta
from typing import Any

from pydantic import BaseModel
from pydantic_settings import BaseSettings, SettingsConfigDict

from sublet import Context, DurableContext, ParentCondition, SleepCondition, Sublet, UserEventCondition
from sublet._declare.base import BaseWorkflow

APPROVED = "order.approved"
CHARGE_DELAY = timedelta(seconds=2)


class Settings(BaseSettings):
    """The settings of a worker process: environment variables with the prefix ``SUBLET_DEMO_``."""

    model_config = SettingsConfigDict(env_prefix="SUBLET_DEMO_")

    pool: str = "demo"
    slots: int = 5
    durable_slots: int = 1
    """0: the worker has no tasks of this kind."""
    workflows: str = ""
    """Names separated by commas. Empty: all workflows."""


class TimeSpan(BaseModel):
    """A time span in a process."""

    began_at: float
    ended_at: float
    pid: int


sublet = Sublet()

# --- an order as a DAG ----------------------------------------------------------------------------------------------


class Order(BaseModel):
    order_id: int
    gift: bool = False


order = sublet.workflow(name="order", input_validator=Order)


@order.task()
async def reserve(input: Order, ctx: Context) -> dict[str, int | bool]:
    return {"order_id": input.order_id, "gift": input.gift}


@order.task(parents=[reserve], skip_if=[ParentCondition(reserve, "!output.gift")])
async def wrap(input: Order, ctx: Context) -> dict[str, str]:
    return {"paper": "red"}


@order.task(parents=[reserve], wait_for=[SleepCondition(CHARGE_DELAY)])
async def charge(input: Order, ctx: Context) -> dict[str, int]:
    return {"charged": ctx.task_output(reserve)["order_id"]}


@order.task(parents=[wrap, charge], wait_for=[UserEventCondition(APPROVED, "input.approved == true")])
async def ship(input: Order, ctx: Context) -> dict[str, int]:
    return {"shipped": ctx.task_output(charge)["charged"]}


# --- a durable fan-out ----------------------------------------------------------------------------------------------


class Number(BaseModel):
    n: int


class Square(TimeSpan):
    value: int


@sublet.task(name="square", input_validator=Number)
async def square(input: Number, ctx: Context) -> Square:
    began_at = time.time()
    await asyncio.sleep(0.02)
    return Square(value=input.n**2, began_at=began_at, ended_at=time.time(), pid=os.getpid())


class FanOut(BaseModel):
    children: int


class Sum(BaseModel):
    value: int
    children: list[TimeSpan]
    invocations: int


@sublet.durable_task(name="sum_of_squares", input_validator=FanOut)
async def sum_of_squares(input: FanOut, ctx: DurableContext) -> Sum:
    squares = await square.aio_run_many([square.create_bulk_run_item(Number(n=n)) for n in range(input.children)])
    spans = [TimeSpan(**each.model_dump(exclude={"value"})) for each in squares]
    return Sum(value=sum(each.value for each in squares), children=spans, invocations=ctx.invocation_count)


# --- sleepers -------------------------------------------------------------------------------------------------------


class Nap(BaseModel):
    seconds: float


class Slept(BaseModel):
    asleep_at: float
    awake_at: float


@sublet.durable_task(name="nap", input_validator=Nap)
async def nap(input: Nap, ctx: DurableContext) -> Slept:
    asleep_at = await ctx.aio_now()
    await ctx.aio_sleep_for(timedelta(seconds=input.seconds))
    awake_at = await ctx.aio_now()
    return Slept(asleep_at=asleep_at.timestamp(), awake_at=awake_at.timestamp())


# --- a slot released explicitly -------------------------------------------------------------------------------------


class Render(BaseModel):
    compute_s: float
    upload_s: float


class Rendered(TimeSpan):
    released_at: float


@sublet.task(name="render", input_validator=Render)
async def render(input: Render, ctx: Context) -> Rendered:
    began_at = time.time()
    await asyncio.sleep(input.compute_s)
    await ctx.aio_release_slot()
    released_at = time.time()
    await asyncio.sleep(input.upload_s)
    return Rendered(began_at=began_at, released_at=released_at, ended_at=time.time(), pid=os.getpid())


# --- tasks that survive the loss of their worker --------------------------------------------------------------------


class Errand(BaseModel):
    seconds: float


class Ran(BaseModel):
    pid: int
    worker_id: str


@sublet.task(name="errand", input_validator=Errand)
async def errand(input: Errand, ctx: Context) -> Ran:
    await asyncio.sleep(input.seconds)
    return Ran(pid=os.getpid(), worker_id=ctx.worker_id)


class Book(BaseModel):
    chapters: int


class Chapter(BaseModel):
    number: int
    pid: int


class Written(BaseModel):
    chapters: list[Chapter]
    invocations: int


async def write_chapter(number: int) -> Chapter:
    await asyncio.sleep(0.5)
    return Chapter(number=number, pid=os.getpid())


@sublet.durable_task(name="book", input_validator=Book)
async def book(input: Book, ctx: DurableContext) -> Written:
    """Each chapter is memoized, so a worker that resumes the task begins with the first missing chapter."""
    chapters = [await ctx.aio_memo(write_chapter, Chapter, number) for number in range(input.chapters)]
    return Written(chapters=chapters, invocations=ctx.invocation_count)


# --- the worker -----------------------------------------------------------------------------------------------------

WORKFLOWS: dict[str, BaseWorkflow[Any]] = {
    "order": order,
    "square": square,
    "sum_of_squares": sum_of_squares,
    "nap": nap,
    "render": render,
    "errand": errand,
    "book": book,
}

settings = Settings()
worker = sublet.worker(
    settings.pool,
    slots=settings.slots or None,
    durable_slots=settings.durable_slots or None,
    workflows=[WORKFLOWS[name] for name in settings.workflows.split(",") if name] or list(WORKFLOWS.values()),
)
