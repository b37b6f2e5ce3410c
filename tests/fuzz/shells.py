"""Whole services on ports in memory: hostile messages between good ones.

Every good one takes effect, every bad one is among the dead with a reason or changes nothing; the batch loop lives,
and nothing is left unacknowledged.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Awaitable, Callable

from fuzz.examples import SPEC
from fuzz.mutation import SEPARATOR
from sublet_platform.memory import MemoryBroker, MemoryCluster, MemoryDatabase, MemoryRunStore, MemoryTimerStore
from sublet_platform.metrics import ServiceMetrics, new_registry
from sublet_platform.ports import Delivery, Outgoing
from sublet_protocol.messages import Hello, Query, RunRequest, SetTimer, encode
from sublet_protocol.specs import TaskSpec, WorkflowSpec
from sublet_protocol.topology import DEAD, EVENTS, INGEST, QUERIES, REQUESTS, TIMERS, run_key, shard_queue, topology
from sublet_scheduler.metrics import SchedulerMetrics
from sublet_scheduler.scheduler import Scheduler
from sublet_timer.metrics import TimerMetrics
from sublet_timer.service import TimerService
from support.ingest_harness import IngestHarness as IngestWorld
from support.ingest_harness import wait
from support.virtual_time import EPOCH_S, VirtualClock, in_virtual_time

MESSAGES_MAX = 8
SETTLING_S = 20.0
GOOD_FLOW = WorkflowSpec("good", (TaskSpec("t"),), "v1")


def _several(data: bytes) -> list[bytes]:
    return data.split(SEPARATOR)[:MESSAGES_MAX]


def _quietly(target: Callable[[bytes], None]) -> Callable[[bytes], None]:
    """What the services say about what they refuse would bury what a run of a million inputs has to say."""

    def attack(data: bytes) -> None:
        before = logging.root.manager.disable
        logging.disable(logging.CRITICAL)
        try:
            target(data)
        finally:
            logging.disable(before)

    return attack


class _Rest:
    """What is left in the queues, and what is among the dead."""

    def __init__(self, cluster: MemoryCluster) -> None:
        self._cluster = cluster
        self.dead: list[Delivery] = []

    async def bury(self, user: MemoryBroker) -> None:
        def receive(delivery: Delivery) -> None:
            self.dead.append(delivery)
            user.ack([delivery])

        await user.consume(DEAD, receive, prefetch=100)

    def check(self, *queues: str) -> None:
        for letter in self.dead:
            assert letter.headers["x-sublet-reason"]
        for name in queues:
            queue = self._cluster.queues[name]
            assert not queue.ready, f"{name} is not worked off"
            assert not any(subscription.unacked for subscription in queue.subscriptions), f"{name} holds messages"


@_quietly
@in_virtual_time
async def ingest(data: bytes) -> None:
    world, (instance,) = await IngestWorld.begin()
    rest = _Rest(world.cluster)
    await rest.bury(world.user)
    good = [wait(f"good-{place}", f"input.good == {place}") for place in range(3)]
    messages = [Outgoing("", INGEST, encode([good[0]]))]
    for body in _several(data):
        messages += [Outgoing("", INGEST, body), Outgoing(EVENTS, "paid", body, headers={"priority": body[:2]})]
    messages.append(Outgoing("", INGEST, encode((*good[1:],))))
    messages += [Outgoing(EVENTS, "paid", b'{"good": %d}' % place) for place in range(3)]
    await world.publish_together(*messages)
    await asyncio.sleep(SETTLING_S)
    assert {wait.task_run_id for wait in good} <= world.woken.keys()
    assert instance.service.alive
    rest.check(INGEST)
    await instance.stop()


@_quietly
@in_virtual_time
async def timer(data: bytes) -> None:
    cluster = MemoryCluster()
    cluster.declare(topology(1))
    user, broker = MemoryBroker(cluster), MemoryBroker(cluster)
    rest = _Rest(cluster)
    await rest.bury(user)
    heard: list[bytes] = []
    await _hear(user, shard_queue(0), heard)
    metrics = ServiceMetrics(new_registry())
    shell = TimerService(
        store=MemoryTimerStore(MemoryDatabase()),
        broker=broker,
        clock=VirtualClock(),
        shards=1,
        metrics=metrics,
        timer_metrics=TimerMetrics(metrics),
    )
    await shell.start()
    good = [SetTimer(f"good-{place}", EPOCH_S + 3 * place, f"good-{place}.t", "1", "z") for place in range(3)]
    between = [Outgoing("", TIMERS, body) for body in _several(data)]
    await user.publish([Outgoing("", TIMERS, encode((good[0],))), *between, Outgoing("", TIMERS, encode((*good[1:],)))])
    await asyncio.sleep(SETTLING_S)
    for each in good:
        assert any(each.task_run_id.encode() in body for body in heard), f"{each.id} has not fired"
    assert shell.alive
    rest.check(TIMERS)
    await shell.stop()


@_quietly
@in_virtual_time
async def scheduler(data: bytes) -> None:
    cluster, database, clock = MemoryCluster(), MemoryDatabase(), VirtualClock()
    cluster.declare(topology(1))
    user, broker = MemoryBroker(cluster), MemoryBroker(cluster)
    rest = _Rest(cluster)
    await rest.bury(user)
    answers: list[bytes] = []
    await user.open_inbox("asker", lambda delivery: answers.append(delivery.body))
    numbers = itertools.count()
    metrics = ServiceMetrics(new_registry())
    process = Scheduler(
        scheduler_id="s",
        shards=1,
        store=MemoryRunStore(database, clock),
        broker=broker,
        clock=clock,
        new_id=lambda: f"minted-{next(numbers)}",
        metrics=metrics,
        scheduler_metrics=SchedulerMetrics(metrics),
    )
    await process.start()
    to_shard = _to_shard(user)
    hello = Hello("good-worker", "good-pool", "good", "nobody", 1, 1, (GOOD_FLOW, SPEC))
    await to_shard(encode([hello]))
    await to_shard(encode([RunRequest("good-0", "good")]))
    for body in _several(data):
        await user.publish([Outgoing(REQUESTS, "query", body), Outgoing(REQUESTS, run_key("any"), body)])
    await to_shard(encode([RunRequest("good-1", "good"), RunRequest("good-2", "good")]))
    await user.publish([Outgoing(REQUESTS, "query", encode([Query("good-query", "asker", "workers")]))])
    await asyncio.sleep(SETTLING_S)
    assert {"good-0", "good-1", "good-2"} <= database.runs.keys()
    assert any(b"good-query" in body for body in answers)
    await to_shard(encode([RunRequest("good-3", "good")]))
    await asyncio.sleep(SETTLING_S)
    assert "good-3" in database.runs, "the shard has stopped working"
    rest.check(shard_queue(0), QUERIES)
    await process.stop()


def _to_shard(user: MemoryBroker) -> Callable[[bytes], Awaitable[None]]:
    async def send(body: bytes) -> None:
        await user.publish([Outgoing(REQUESTS, run_key("any"), body)])

    return send


async def _hear(user: MemoryBroker, queue: str, heard: list[bytes]) -> None:
    def receive(delivery: Delivery) -> None:
        heard.append(delivery.body)
        user.ack([delivery])

    await user.consume(queue, receive, prefetch=1_000)
