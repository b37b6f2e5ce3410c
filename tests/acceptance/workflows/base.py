"""What all workflows under test share: the client, the journal, small types, and tasks that are children of others."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path

from pydantic import BaseModel

from acceptance.task_journal import TaskJournal
from sublet import Context, Sublet

client = Sublet()
journal = TaskJournal(Path(os.environ["SUBLET_TEST_JOURNAL"]))

AN_HOUR = timedelta(hours=1)
A_MOMENT = timedelta(milliseconds=200)


class Named(BaseModel):
    """``name`` tells runs apart, in the journal and in the names of gates."""

    name: str = ""


class Number(BaseModel):
    n: int


class Where(BaseModel):
    """Which worker a task ran on, and how often it began."""

    worker: str
    invocations: int = 0


@client.task(input_validator=Number)
async def double(input: Number, ctx: Context) -> Number:
    journal.write("doubled", n=input.n)
    return Number(n=2 * input.n)


@client.task(input_validator=Named, execution_timeout="5m")
async def work(input: Named, ctx: Context) -> Where:
    """Takes its slot until its gate opens."""
    journal.write("work began", name=input.name)
    await journal.pass_gate(input.name)
    journal.write("work ended", name=input.name)
    return Where(worker=ctx.worker_id)


@client.task(input_validator=Named, execution_timeout="5m")
def work_in_a_thread(input: Named, ctx: Context) -> Where:
    journal.write("work began", name=input.name)
    journal.pass_gate_blocking(input.name)
    journal.write("work ended", name=input.name)
    return Where(worker=ctx.worker_id)


async def charge(name: str) -> Number:
    """Something that must not be done twice: how often it was done, this time included."""
    journal.write("charged", name=name)
    return Number(n=journal.count("charged"))
