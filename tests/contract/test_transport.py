"""The contract of the SDK's `Transport`, for every adapter."""

from __future__ import annotations

import asyncio

import pytest

from contract.adapters import Inbox, World, new_queue, unique
from sublet._amqp.transport import TicketDelivery
from sublet._errors import TransportUnavailable
from sublet_platform.ports import Outgoing
from sublet_protocol.topology import INBOXES, POOL_ARGUMENTS, Queue, Topology
from support.polling import short_delay, until


class Tickets(list[TicketDelivery]):
    def __call__(self, ticket: TicketDelivery) -> None:
        self.append(ticket)

    @property
    def bodies(self) -> list[bytes]:
        return [ticket.body for ticket in self]


async def a_pool(world: World, tickets: int) -> str:
    """A pool's queue that holds tickets."""
    name = unique("pool")
    await world.declare(Topology((), (Queue(name, POOL_ARGUMENTS),), ()))
    client = await world.client()
    await client.publish([Outgoing("", name, str(number).encode(), persistent=False) for number in range(tickets)])
    return name


# --- publish -------------------------------------------------------------------------------------------


async def test_a_message_arrives_with_all_its_properties(world: World) -> None:
    client, worker = await world.client(), await world.worker()
    queue = await new_queue(world)
    inbox = Inbox()
    await client.consume(queue, inbox, prefetch=10)
    await worker.publish("", queue, b"[]", message_id="m-1", headers={"scope": "acme", "priority": 2})
    await until(lambda: inbox, "a delivery")
    assert inbox[0].body == b"[]"
    assert inbox[0].message_id == "m-1"
    assert dict(inbox[0].headers) == {"scope": "acme", "priority": 2}


async def test_a_publish_waits_for_the_reconnect(world: World) -> None:
    client, worker = await world.client(), await world.worker()
    queue = await new_queue(world)
    inbox = Inbox()
    await client.consume(queue, inbox, prefetch=10)
    world.cut_worker(worker)
    await until(lambda: not worker.connected, "the cut")
    publishing = asyncio.create_task(worker.publish("", queue, b"report"))
    await short_delay()
    assert not publishing.done()
    world.mend_worker(worker)
    await publishing
    await until(lambda: inbox, "a delivery")
    assert set(inbox.bodies) == {b"report"}


async def test_a_publish_fails_after_its_timeout(world: World) -> None:
    worker = await world.worker(publish_timeout_s=0.3)
    queue = await new_queue(world)
    world.cut_worker(worker)
    await until(lambda: not worker.connected, "the cut")
    with pytest.raises(TransportUnavailable):
        await worker.publish("", queue, b"report")


async def test_unconfirmed_messages_are_sent_and_are_lost_without_a_connection(world: World) -> None:
    client, worker = await world.client(), await world.worker()
    name = unique("inbox")
    await new_queue(world)
    inbox = Inbox()
    await client.open_inbox(name, inbox)
    worker.publish_nowait(INBOXES, name, b"claim")
    await until(lambda: inbox, "the unconfirmed message")
    world.cut_worker(worker)
    await until(lambda: not worker.connected, "the cut")
    worker.publish_nowait(INBOXES, name, b"lost")
    world.mend_worker(worker)
    await until(lambda: worker.connected, "the reconnect")
    await short_delay()
    assert inbox.bodies == [b"claim"]


# --- tickets ----------------------------------------------------------------------------------------------


async def test_a_worker_holds_no_more_tickets_than_it_has_slots(world: World) -> None:
    worker = await world.worker()
    pool = await a_pool(world, tickets=5)
    tickets = Tickets()
    await worker.consume_pool(pool, 2, tickets)
    await until(lambda: len(tickets) == 2, "two tickets")
    await short_delay()
    assert tickets.bodies == [b"0", b"1"]
    worker.ack(tickets[1])
    await until(lambda: len(tickets) == 3, "the third")
    await short_delay()
    assert tickets.bodies == [b"0", b"1", b"2"]


async def test_a_requeued_ticket_goes_to_a_worker_with_a_free_slot(world: World) -> None:
    first, second = await world.worker(), await world.worker()
    pool = await a_pool(world, tickets=1)
    one, two = Tickets(), Tickets()
    consumer = await first.consume_pool(pool, 1, one)
    await until(lambda: one, "the ticket")
    await consumer.cancel()
    await second.consume_pool(pool, 1, two)
    first.requeue(one[0])
    await until(lambda: two, "the ticket at the other worker")
    assert two[0].redelivered
    assert len(one) == 1


async def test_a_cancelled_pool_consumer_gets_no_tickets_and_may_still_acknowledge(world: World) -> None:
    first, second = await world.worker(), await world.worker()
    pool = await a_pool(world, tickets=3)
    one, two = Tickets(), Tickets()
    consumer = await first.consume_pool(pool, 2, one)
    await until(lambda: len(one) == 2, "tickets")
    await consumer.cancel()
    first.ack(one[0])
    await short_delay()
    assert len(one) == 2
    await first.close()
    await second.consume_pool(pool, 10, two)
    await until(lambda: len(two) == 2, "the rest")
    assert sorted(two.bodies) == [b"1", b"2"]


async def test_tickets_of_a_lost_connection_are_redelivered_on_another_channel(world: World) -> None:
    worker = await world.worker()
    pool = await a_pool(world, tickets=2)
    tickets = Tickets()
    reconnects: list[bool] = []
    worker.on_reconnect(lambda: reconnects.append(worker.connected))
    await worker.consume_pool(pool, 2, tickets)
    await until(lambda: len(tickets) == 2, "tickets")
    before = list(tickets)
    world.cut_worker(worker)
    await until(lambda: not worker.connected, "the cut")
    world.mend_worker(worker)
    await until(lambda: len(tickets) == 4 and reconnects, "the tickets again")
    again = tickets[2:]
    assert all(ticket.redelivered for ticket in again)
    assert {ticket.channel for ticket in before}.isdisjoint({ticket.channel for ticket in again})
    assert reconnects == [True]
    for ticket in before:
        worker.ack(ticket)
    await short_delay()
    assert len(tickets) == 4
    assert worker.connected


# --- the inbox --------------------------------------------------------------------------------------------


async def test_an_inbox_receives_messages_before_and_after_a_lost_connection(world: World) -> None:
    client, worker = await world.client(), await world.worker()
    await new_queue(world)
    name = unique("inbox")
    bodies: list[bytes] = []
    reconnects: list[None] = []
    worker.on_reconnect(lambda: reconnects.append(None))
    await worker.open_inbox(name, bodies.append)
    await client.publish([Outgoing(INBOXES, name, b"1")])
    await until(lambda: bodies == [b"1"], "the first message")
    world.cut_worker(worker)
    await until(lambda: not worker.connected, "the cut")
    world.mend_worker(worker)
    await until(lambda: reconnects, "the reconnect")
    await client.publish([Outgoing(INBOXES, name, b"2")])
    await until(lambda: bodies == [b"1", b"2"], "the second message")
