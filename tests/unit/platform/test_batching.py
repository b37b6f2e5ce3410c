"""Batches of deliveries: grouping, retries, requeues and dead letters."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
from prometheus_client import CollectorRegistry

from contract.adapters import Inbox
from sublet_platform.batching import BatchLoop
from sublet_platform.memory import MemoryBroker, MemoryCluster
from sublet_platform.metrics import ServiceMetrics
from sublet_platform.ports import BrokerUnavailable, Delivery, Outgoing, RevisionConflict, StoreUnavailable
from sublet_protocol.topology import DEAD, Queue, topology
from support.polling import short_delay, until

QUEUE = "work"


class BatchHarness:
    """A queue, a batch loop over it, and a process whose behaviour a test chooses."""

    def __init__(self) -> None:
        self.cluster = MemoryCluster()
        self.cluster.declare(topology(shards=1))
        self.cluster.declare_queue(Queue(QUEUE))
        self.broker = MemoryBroker(self.cluster)
        self.publisher = MemoryBroker(self.cluster)
        self.metrics = ServiceMetrics(CollectorRegistry())
        self.batches: list[list[bytes]] = []
        self.failures = 0
        self.conflicts = 0
        self.behave: Callable[[list[bytes]], Awaitable[None]] = self.succeed
        self.loop = BatchLoop(
            self.process,
            self.broker,
            self.metrics,
            name="work",
            max_items=5,
            on_failure=self.count_failure,
            on_conflict=self.count_conflict,
        )

    async def start(self) -> None:
        await self.broker.consume(QUEUE, self.loop.handle, prefetch=100)
        self.loop.start()

    async def send(self, *bodies: str) -> None:
        await self.publisher.publish([Outgoing("", QUEUE, body.encode()) for body in bodies])

    async def process(self, batch: list[Delivery]) -> None:
        bodies = [delivery.body for delivery in batch]
        self.batches.append(bodies)
        await self.behave(bodies)

    async def succeed(self, bodies: list[bytes]) -> None:
        await asyncio.sleep(0)

    def count_failure(self) -> None:
        self.failures += 1

    def count_conflict(self) -> None:
        self.conflicts += 1

    @property
    def unsettled(self) -> int:
        queue = self.cluster.queues[QUEUE]
        return len(queue.ready) + sum(len(each.unacked) for each in queue.subscriptions)

    async def dead(self) -> Inbox:
        """An inbox that consumes ``sublet.dead``."""
        inbox = Inbox()
        await self.publisher.consume(DEAD, inbox, prefetch=100)
        return inbox


@pytest.fixture
async def harness() -> AsyncIterator[BatchHarness]:
    harness = BatchHarness()
    await harness.start()
    yield harness
    harness.behave = harness.succeed
    await harness.loop.stop()


async def test_arrived_deliveries_are_handled_together_and_acknowledged(harness: BatchHarness) -> None:
    await harness.send("1", "2", "3")
    await until(lambda: harness.unsettled == 0, "the acknowledgement")
    assert harness.batches == [[b"1", b"2", b"3"]]


async def test_a_resting_loop_finishes_its_batch_and_begins_no_other(harness: BatchHarness) -> None:
    gate = asyncio.Event()

    async def wait(_: list[bytes]) -> None:
        await gate.wait()

    harness.behave = wait
    await harness.send("1")
    await until(lambda: harness.batches == [[b"1"]], "the first batch")
    await harness.send("2", "3")
    resting = asyncio.create_task(harness.loop.rest())
    await short_delay()
    assert not resting.done()
    gate.set()
    await resting
    await short_delay()
    assert harness.batches == [[b"1"]]
    assert harness.unsettled == 2
    harness.loop.resume()
    await until(lambda: harness.unsettled == 0, "the rest")
    assert harness.batches == [[b"1"], [b"2", b"3"]]


async def test_a_resting_loop_requeues_a_batch_that_cannot_be_settled(harness: BatchHarness) -> None:
    async def fail(_: list[bytes]) -> None:
        raise StoreUnavailable("no primary")

    harness.behave = fail
    await harness.send("1")
    await until(lambda: harness.failures > 0, "a failure")
    await harness.loop.rest()
    assert harness.unsettled == 1


async def test_deliveries_that_arrive_during_a_batch_form_the_next_one(harness: BatchHarness) -> None:
    gate = asyncio.Event()

    async def wait(_: list[bytes]) -> None:
        await gate.wait()

    harness.behave = wait
    await harness.send("1")
    await until(lambda: harness.batches, "the first batch")
    for body in ("2", "3", "4"):
        await harness.send(body)
    gate.set()
    await until(lambda: harness.unsettled == 0, "the acknowledgement")
    assert harness.batches == [[b"1"], [b"2", b"3", b"4"]]


async def test_a_batch_holds_no_more_than_its_maximum(harness: BatchHarness) -> None:
    await harness.send(*"abcdefg")
    await until(lambda: harness.unsettled == 0, "the acknowledgement")
    assert [len(batch) for batch in harness.batches] == [5, 2]


@pytest.mark.parametrize("error", [StoreUnavailable("no primary"), BrokerUnavailable("not confirmed")])
async def test_the_same_deliveries_are_retried_while_a_server_is_unavailable(
    harness: BatchHarness, error: Exception
) -> None:
    outcomes = [error, error, None]

    async def recover(_: list[bytes]) -> None:
        outcome = outcomes.pop(0)
        if outcome is not None:
            raise outcome

    harness.behave = recover
    await harness.send("1", "2")
    await until(lambda: harness.unsettled == 0, "the acknowledgement")
    assert harness.batches == [[b"1", b"2"]] * 3
    assert harness.failures == 2


async def test_a_conflict_requeues_the_batch(harness: BatchHarness) -> None:
    async def conflict_once(_: list[bytes]) -> None:
        if len(harness.batches) == 1:
            raise RevisionConflict("another writer")

    harness.behave = conflict_once
    await harness.send("1", "2")
    await until(lambda: harness.unsettled == 0 and len(harness.batches) > 1, "the second attempt")
    assert sorted(body for batch in harness.batches[1:] for body in batch) == [b"1", b"2"]
    assert harness.conflicts == 1
    assert harness.failures == 0


async def test_only_the_message_that_fails_its_batch_is_dead_lettered(harness: BatchHarness) -> None:
    async def reject(bodies: list[bytes]) -> None:
        if b"poison" in bodies:
            raise ValueError("cannot digest this")

    harness.behave = reject
    dead = await harness.dead()
    await harness.send("1", "poison", "3")
    await until(lambda: dead, "the dead letter")
    await until(lambda: harness.unsettled == 0, "the acknowledgement")
    assert harness.batches == [[b"1", b"poison", b"3"], [b"1"], [b"poison"], [b"3"]]
    [message] = dead
    assert message.body == b"poison"
    assert message.headers["x-sublet-reason"] == "ValueError: cannot digest this"
    assert message.headers["x-sublet-exchange"] == ""
    assert message.headers["x-sublet-routing-key"] == QUEUE
    registry = harness.metrics.registry
    assert registry.get_sample_value("sublet_messages_dead_lettered_total", {"loop": "work"}) == 1
    assert registry.get_sample_value("sublet_messages_handled_total", {"loop": "work"}) == 2


async def test_an_outage_while_messages_are_retried_one_by_one_dead_letters_none_of_the_others(
    harness: BatchHarness,
) -> None:
    errors: list[Exception] = [StoreUnavailable("no primary")]

    async def reject(bodies: list[bytes]) -> None:
        if b"poison" in bodies:
            raise ValueError("cannot digest this")
        if errors:
            raise errors.pop()

    harness.behave = reject
    dead = await harness.dead()
    await harness.send("poison", "good")
    await until(lambda: dead and harness.unsettled == 0, "the end")
    assert dead.bodies == [b"poison"]
    assert harness.batches[-2:] == [[b"good"], [b"good"]]


async def test_a_dead_letter_is_published_until_the_broker_confirms_it(harness: BatchHarness) -> None:
    harness.cluster.delete_queue(DEAD)

    async def reject(_: list[bytes]) -> None:
        raise ValueError("no")

    harness.behave = reject
    await harness.send("poison")
    await until(lambda: harness.batches, "the attempt")
    await short_delay()
    assert harness.unsettled == 1
    harness.cluster.declare(topology(shards=1))
    dead = await harness.dead()
    await until(lambda: dead and harness.unsettled == 0, "the dead letter")


async def test_void_deliveries_are_not_retried(harness: BatchHarness) -> None:
    gate = asyncio.Event()

    async def wait(_: list[bytes]) -> None:
        await gate.wait()

    harness.behave = wait
    await harness.send("1")
    await until(lambda: harness.batches, "the first batch")
    await harness.send("2")
    harness.broker.kill_connection()
    await until(lambda: harness.broker.connected, "the reconnect")
    gate.set()
    await until(lambda: harness.unsettled == 0, "the acknowledgement")
    assert [body for batch in harness.batches for body in batch] == [b"1", b"1", b"2"]


async def test_a_stop_handles_all_arrived_deliveries(harness: BatchHarness) -> None:
    gate = asyncio.Event()

    async def wait(_: list[bytes]) -> None:
        await gate.wait()

    harness.behave = wait
    await harness.send("1")
    await until(lambda: harness.batches, "the first batch")
    await harness.send("2")
    await short_delay()
    gate.set()
    await harness.loop.stop()
    assert harness.batches == [[b"1"], [b"2"]]
    assert not harness.loop.alive


async def test_a_stop_does_not_wait_for_an_unavailable_server(harness: BatchHarness) -> None:
    async def fail(_: list[bytes]) -> None:
        raise StoreUnavailable("no primary")

    harness.behave = fail
    await harness.send("1", "2")
    await until(lambda: len(harness.batches) > 1, "some attempts")
    await harness.loop.stop()
    await short_delay()
    assert harness.unsettled == 2
