"""Batches of deliveries: what goes together, what is tried again, and what is put aside."""

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


class Bench:
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
        """What is in ``sublet.dead``, as it comes."""
        inbox = Inbox()
        await self.publisher.consume(DEAD, inbox, prefetch=100)
        return inbox


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    bench = Bench()
    await bench.start()
    yield bench
    bench.behave = bench.succeed
    await bench.loop.stop()


async def test_what_has_arrived_is_handled_together_and_acknowledged(bench: Bench) -> None:
    await bench.send("1", "2", "3")
    await until(lambda: bench.unsettled == 0, "the acknowledgement")
    assert bench.batches == [[b"1", b"2", b"3"]]


async def test_who_rests_finishes_what_is_under_way_and_begins_nothing_else(bench: Bench) -> None:
    gate = asyncio.Event()

    async def wait(_: list[bytes]) -> None:
        await gate.wait()

    bench.behave = wait
    await bench.send("1")
    await until(lambda: bench.batches == [[b"1"]], "the first batch")
    await bench.send("2", "3")
    resting = asyncio.create_task(bench.loop.rest())
    await short_delay()
    assert not resting.done()
    gate.set()
    await resting
    await short_delay()
    assert bench.batches == [[b"1"]]
    assert bench.unsettled == 2
    bench.loop.resume()
    await until(lambda: bench.unsettled == 0, "the rest")
    assert bench.batches == [[b"1"], [b"2", b"3"]]


async def test_who_is_to_rest_requeues_what_cannot_be_settled_now(bench: Bench) -> None:
    async def fail(_: list[bytes]) -> None:
        raise StoreUnavailable("away")

    bench.behave = fail
    await bench.send("1")
    await until(lambda: bench.failures > 0, "a failure")
    await bench.loop.rest()
    assert bench.unsettled == 1


async def test_the_next_batch_gathers_while_one_is_under_way(bench: Bench) -> None:
    gate = asyncio.Event()

    async def wait(_: list[bytes]) -> None:
        await gate.wait()

    bench.behave = wait
    await bench.send("1")
    await until(lambda: bench.batches, "the first batch")
    for body in ("2", "3", "4"):
        await bench.send(body)
    gate.set()
    await until(lambda: bench.unsettled == 0, "the acknowledgement")
    assert bench.batches == [[b"1"], [b"2", b"3", b"4"]]


async def test_a_batch_holds_no_more_than_its_maximum(bench: Bench) -> None:
    await bench.send(*"abcdefg")
    await until(lambda: bench.unsettled == 0, "the acknowledgement")
    assert [len(batch) for batch in bench.batches] == [5, 2]


@pytest.mark.parametrize("error", [StoreUnavailable("no primary"), BrokerUnavailable("not confirmed")])
async def test_the_same_deliveries_are_tried_again_when_a_server_is_away(bench: Bench, error: Exception) -> None:
    outcomes = [error, error, None]

    async def recover(_: list[bytes]) -> None:
        outcome = outcomes.pop(0)
        if outcome is not None:
            raise outcome

    bench.behave = recover
    await bench.send("1", "2")
    await until(lambda: bench.unsettled == 0, "the acknowledgement")
    assert bench.batches == [[b"1", b"2"]] * 3
    assert bench.failures == 2


async def test_a_conflict_gives_the_batch_back(bench: Bench) -> None:
    async def conflict_once(_: list[bytes]) -> None:
        if len(bench.batches) == 1:
            raise RevisionConflict("another writer")

    bench.behave = conflict_once
    await bench.send("1", "2")
    await until(lambda: bench.unsettled == 0 and len(bench.batches) > 1, "the second attempt")
    assert sorted(body for batch in bench.batches[1:] for body in batch) == [b"1", b"2"]
    assert bench.conflicts == 1
    assert bench.failures == 0


async def test_a_message_that_breaks_its_batch_goes_alone_to_the_dead(bench: Bench) -> None:
    async def choke(bodies: list[bytes]) -> None:
        if b"poison" in bodies:
            raise ValueError("cannot digest this")

    bench.behave = choke
    dead = await bench.dead()
    await bench.send("1", "poison", "3")
    await until(lambda: dead, "the dead letter")
    await until(lambda: bench.unsettled == 0, "the acknowledgement")
    assert bench.batches == [[b"1", b"poison", b"3"], [b"1"], [b"poison"], [b"3"]]
    [letter] = dead
    assert letter.body == b"poison"
    assert letter.headers["x-sublet-reason"] == "ValueError: cannot digest this"
    assert letter.headers["x-sublet-exchange"] == ""
    assert letter.headers["x-sublet-routing-key"] == QUEUE
    registry = bench.metrics.registry
    assert registry.get_sample_value("sublet_messages_dead_lettered_total", {"loop": "work"}) == 1
    assert registry.get_sample_value("sublet_messages_handled_total", {"loop": "work"}) == 2


async def test_a_server_that_goes_away_while_messages_are_tried_alone_buries_none_of_the_good(bench: Bench) -> None:
    trouble: list[Exception] = [StoreUnavailable("no primary")]

    async def choke(bodies: list[bytes]) -> None:
        if b"poison" in bodies:
            raise ValueError("cannot digest this")
        if trouble:
            raise trouble.pop()

    bench.behave = choke
    dead = await bench.dead()
    await bench.send("poison", "good")
    await until(lambda: dead and bench.unsettled == 0, "the end")
    assert dead.bodies == [b"poison"]
    assert bench.batches[-2:] == [[b"good"], [b"good"]]


async def test_a_dead_letter_waits_for_a_broker_that_does_not_confirm(bench: Bench) -> None:
    bench.cluster.delete_queue(DEAD)

    async def choke(_: list[bytes]) -> None:
        raise ValueError("no")

    bench.behave = choke
    await bench.send("poison")
    await until(lambda: bench.batches, "the attempt")
    await short_delay()
    assert bench.unsettled == 1
    bench.cluster.declare(topology(shards=1))
    dead = await bench.dead()
    await until(lambda: dead and bench.unsettled == 0, "the dead letter")


async def test_deliveries_that_became_void_are_left_to_their_redelivery(bench: Bench) -> None:
    gate = asyncio.Event()

    async def wait(_: list[bytes]) -> None:
        await gate.wait()

    bench.behave = wait
    await bench.send("1")
    await until(lambda: bench.batches, "the first batch")
    await bench.send("2")
    bench.broker.kill_connection()
    await until(lambda: bench.broker.connected, "the reconnect")
    gate.set()
    await until(lambda: bench.unsettled == 0, "the acknowledgement")
    assert [body for batch in bench.batches for body in batch] == [b"1", b"1", b"2"]


async def test_a_stop_handles_what_has_arrived(bench: Bench) -> None:
    gate = asyncio.Event()

    async def wait(_: list[bytes]) -> None:
        await gate.wait()

    bench.behave = wait
    await bench.send("1")
    await until(lambda: bench.batches, "the first batch")
    await bench.send("2")
    await short_delay()
    gate.set()
    await bench.loop.stop()
    assert bench.batches == [[b"1"], [b"2"]]
    assert not bench.loop.alive


async def test_a_stop_does_not_wait_for_a_server_that_is_away(bench: Bench) -> None:
    async def fail(_: list[bytes]) -> None:
        raise StoreUnavailable("no primary")

    bench.behave = fail
    await bench.send("1", "2")
    await until(lambda: len(bench.batches) > 1, "some attempts")
    await bench.loop.stop()
    await short_delay()
    assert bench.unsettled == 2
