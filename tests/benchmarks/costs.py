"""The costs of a run, independent of the machine: messages, document writes and bytes, counted by the servers.

Needs the broker and the database of `deploy/local`: only of its own broker can it ask such questions.
"""

from __future__ import annotations

import asyncio
import os
import re
import time
from dataclasses import dataclass, fields

from deploy.localstack.stack import Stack

from benchmarks import workloads
from sublet import BulkPushEventWithMetadata
from sublet_platform.mongo.client import Mongo, connect

BUDGET = {"noop_writes": 3.1, "noop_messages": 3.0, "wait_writes": 11.1, "wait_messages": 8.0}
"""Upper limits for each run. The writes are exact: a no-op task is inserted, granted and finished. Most messages carry
several runs, more of them the busier the system is. Only the notice of a run's end and an event are sent alone."""

REGISTERED_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Counters:
    """``messages``: received by the broker; ``confirmed``: those with a confirm; ``writes``: of documents; bytes: all
    that the two servers received."""

    messages: int
    confirmed: int
    message_bytes: int
    writes: int
    write_bytes: int

    def per_run(self, before: Counters, name: str, runs: int) -> dict[str, float]:
        return {
            f"{name}_{each.name}": (getattr(self, each.name) - getattr(before, each.name)) / runs
            for each in fields(self)
        }


async def cost(scale: float) -> dict[str, float]:
    """The costs of a no-op task and of an evicted task that waits for one event, with requests, results, notices and
    events."""
    mongo = connect(os.environ["SUBLET_MONGO_URL"], "sublet")
    try:
        return await _of_noops(mongo, int(1_000 * scale)) | await _of_waits(mongo, int(500 * scale))
    finally:
        mongo.close()


def over_budget(figures: dict[str, float]) -> list[str]:
    """A line for each cost that exceeds its limit."""
    return [
        f"{name} is {figures[name]:.1f}, and {most} at most" for name, most in BUDGET.items() if figures[name] > most
    ]


async def _of_noops(mongo: Mongo, count: int) -> dict[str, float]:
    items = [workloads.noop.create_bulk_run_item(workloads.Number(n=n)) for n in range(count)]
    before = await _count(mongo)
    await workloads.noop.aio_run_many(items)
    return (await _count(mongo)).per_run(before, "noop", count)


async def _of_waits(mongo: Mongo, count: int) -> dict[str, float]:
    first = int(time.time() * 1_000)
    numbers = range(first, first + count)
    items = [workloads.wake.create_bulk_run_item(workloads.Number(n=n)) for n in numbers]
    waiting_before = await mongo.count("subscriptions")
    before = await _count(mongo)
    refs = await workloads.wake.aio_run_many(items, wait_for_result=False)
    async with asyncio.timeout(REGISTERED_TIMEOUT_S):
        while await mongo.count("subscriptions") < waiting_before + count:  # noqa: ASYNC110  # it has to be asked
            await asyncio.sleep(0.1)
    events = [BulkPushEventWithMetadata(key="bench.wake", payload={"n": n, "sent_at": time.time()}) for n in numbers]
    await workloads.client.event.aio_bulk_push(events)
    await asyncio.gather(*(ref.aio_result() for ref in refs))
    return (await _count(mongo)).per_run(before, "wait", count)


async def _count(mongo: Mongo) -> Counters:
    rabbit = Stack().rabbit
    if os.environ["SUBLET_AMQP_URL"] != rabbit.url:
        raise RuntimeError("what a run costs is measured with the broker of `deploy/local up` only")
    counted = await asyncio.to_thread(rabbit.ctl, "eval", "rabbit_global_counters:overview().")
    received = await asyncio.to_thread(rabbit.ctl, "list_connections", "recv_oct")
    server = await mongo.server_status()
    documents = server["metrics"]["document"]
    return Counters(
        messages=_sum(counted, "messages_received_total"),
        confirmed=_sum(counted, "messages_received_confirm_total"),
        message_bytes=sum(int(line) for line in received.split() if line.isdigit()),
        writes=documents["inserted"] + documents["updated"] + documents["deleted"],
        write_bytes=server["network"]["bytesIn"],
    )


def _sum(counted: str, name: str) -> int:
    return sum(int(value) for value in re.findall(rf"\b{name} => (\d+)", counted))
