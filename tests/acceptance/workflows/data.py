"""Inputs and outputs of every sort, and what a worker lends its tasks."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from acceptance.workflows.base import Named, client, journal
from sublet import Context, EmptyModel

# --- data -------------------------------------------------------------------------------------------------------------


@dataclass
class Point:
    x: int
    y: int = 0


@client.task(input_validator=Point)
async def mirror_point(input: Point, ctx: Context) -> Point:
    return Point(input.y, input.x)


@client.task(input_validator=dict)
def mirror_dict(input: dict[str, Any], ctx: Context) -> dict[str, Any]:
    return dict(reversed(input.items()))


@client.task()
async def mirror_anything(input: EmptyModel, ctx: Context) -> dict[str, Any]:
    return input.model_dump()


# --- a worker's own life ----------------------------------------------------------------------------------------------


async def lifespan() -> AsyncIterator[dict[str, str]]:
    journal.write("lifespan began")
    yield {"pool": "of connections"}
    journal.write("lifespan ended")


@client.task(input_validator=Named, execution_timeout="5m")
async def use_lifespan(input: Named, ctx: Context) -> dict[str, str]:
    journal.write("work began", name=input.name)
    await journal.pass_gate(input.name)
    journal.write("work ended", name=input.name)
    return dict(ctx.lifespan)
