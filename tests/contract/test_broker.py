"""The contract of `Broker`, for every adapter."""

from __future__ import annotations

import asyncio
from functools import partial

import pytest

from contract.adapters import Inbox, World, new_exchange, new_queue, unique
from sublet_platform.ports import Broker, BrokerUnavailable, Outgoing
from sublet_protocol.topology import INBOXES
from support.polling import short_delay, until


def to(queue: str, *bodies: str) -> list[Outgoing]:
    """Messages for a queue, through the default exchange."""
    return [Outgoing("", queue, body.encode()) for body in bodies]


def numbers(count: int) -> list[str]:
    return [str(number) for number in range(count)]


async def filled(
    world: World, count: int, *, quorum: bool = False, **arguments: str | int | bool
) -> tuple[Broker, str]:
    """A client, and a queue of its own that holds the messages 0 to ``count - 1``."""
    client = await world.client()
    queue = await new_queue(world, quorum=quorum, **arguments)
    await client.publish(to(queue, *numbers(count)))
    return client, queue


# --- deliveries -------------------------------------------------------------------------------------------


async def test_a_message_arrives_with_all_its_properties(world: World) -> None:
    client = await world.client()
    queue = await new_queue(world)
    exchange = await new_exchange(world, "topic", {queue: "order.#"})
    inbox = Inbox()
    await client.consume(queue, inbox, prefetch=10)
    headers = {"scope": "acme", "priority": 3}
    await client.publish([Outgoing(exchange, "order.paid.eu", b'{"a": 1}', message_id="m-1", headers=headers)])
    await until(lambda: inbox, "a delivery")
    [delivery] = inbox
    assert delivery.body == b'{"a": 1}'
    assert (delivery.exchange, delivery.routing_key) == (exchange, "order.paid.eu")
    assert delivery.message_id == "m-1"
    assert dict(delivery.headers) == headers
    assert not delivery.redelivered


async def test_messages_arrive_in_the_order_in_which_they_were_published(world: World) -> None:
    client, queue = await filled(world, 300)
    inbox = Inbox()
    await client.consume(queue, inbox, prefetch=300)
    await until(lambda: len(inbox) == 300, "all deliveries")
    assert inbox.bodies == [number.encode() for number in numbers(300)]


async def test_unconfirmed_messages_arrive(world: World) -> None:
    client = await world.client()
    queue = await new_queue(world)
    inbox = Inbox()
    await client.consume(queue, inbox, prefetch=100)
    client.publish_nowait(to(queue, "a", "b"))
    client.publish_nowait(to(queue, "c"))
    await until(lambda: len(inbox) == 3, "the messages")
    assert inbox.bodies == [b"a", b"b", b"c"]


@pytest.mark.parametrize("steps", range(5))
async def test_an_unconfirmed_message_is_sent_also_while_others_are_being_sent(world: World, steps: int) -> None:
    client = await world.client()
    queue = await new_queue(world)
    inbox = Inbox()
    await client.consume(queue, inbox, prefetch=10)
    client.publish_nowait(to(queue, "a"))
    for _ in range(steps):
        await asyncio.sleep(0)
    client.publish_nowait(to(queue, "b"))
    await until(lambda: len(inbox) == 2, "both messages")
    assert inbox.bodies == [b"a", b"b"]


async def test_unconfirmed_messages_of_any_size_arrive_in_order(world: World) -> None:
    client = await world.client()
    queue = await new_queue(world)
    sizes = [1, 0, 131_064, 131_065, 300_000, 2]
    inbox = Inbox()
    await client.consume(queue, inbox, prefetch=10)
    client.publish_nowait([Outgoing("", queue, b"x" * size, persistent=False) for size in sizes])
    await until(lambda: len(inbox) == len(sizes), "all messages")
    assert [len(body) for body in inbox.bodies] == sizes


async def test_an_unconfirmed_message_that_cannot_be_sent_does_not_affect_the_others(world: World) -> None:
    client = await world.client()
    queue = await new_queue(world)
    inbox = Inbox()
    await client.consume(queue, inbox, prefetch=10)
    impossible = Outgoing("", "k" * 300, b"lost", persistent=False)
    client.publish_nowait([*to(queue, "a"), impossible, *to(queue, "b")])
    await until(lambda: len(inbox) == 2, "the other messages")
    assert inbox.bodies == [b"a", b"b"]


@pytest.mark.parametrize(
    ("kind", "pattern", "fits", "fits_not"),
    [
        ("direct", "bucket.07", ["bucket.07"], ["bucket.08", "bucket"]),
        ("topic", "#", ["a", "a.b.c"], []),
        ("topic", "run.*.order", ["run.completed.order"], ["run.order", "run.a.b.order"]),
        ("topic", "run.#", ["run", "run.a", "run.a.b"], ["runs.a"]),
        ("fanout", "", ["anything"], []),
    ],
)
async def test_an_exchange_routes_by_its_kind(
    world: World, kind: str, pattern: str, fits: list[str], fits_not: list[str]
) -> None:
    client = await world.client()
    queue = await new_queue(world)
    exchange = await new_exchange(world, kind, {queue: pattern})
    inbox = Inbox()
    await client.consume(queue, inbox, prefetch=100)
    client.publish_nowait([Outgoing(exchange, key, key.encode()) for key in [*fits_not, *fits]])
    await until(lambda: len(inbox) >= len(fits), "the deliveries")
    await short_delay()
    assert inbox.bodies == [key.encode() for key in fits]


async def test_two_consumers_share_a_queue_and_each_message_goes_to_one(world: World) -> None:
    first, queue = await filled(world, 20)
    second = await world.client()
    one, two = Inbox(), Inbox()
    await first.consume(queue, one, prefetch=10)
    await second.consume(queue, two, prefetch=10)
    await until(lambda: len(one) + len(two) == 20, "all deliveries")
    assert sorted(one.bodies + two.bodies) == sorted(number.encode() for number in numbers(20))
    assert len(one) == len(two) == 10


async def test_one_client_may_consume_a_queue_again_after_it_has_closed_its_consumer(world: World) -> None:
    client, queue = await filled(world, 3)
    first, second = Inbox(), Inbox()
    consumer = await client.consume(queue, first, prefetch=2)
    await until(lambda: len(first) == 2, "deliveries")
    await consumer.close()
    await client.consume(queue, second, prefetch=1)
    await until(lambda: second, "a delivery")
    await short_delay()
    assert second.bodies == [b"0"]


async def test_consuming_a_missing_queue_fails(world: World) -> None:
    client = await world.client()
    with pytest.raises(BrokerUnavailable):
        await client.consume(unique("missing"), Inbox(), prefetch=1)


# --- acknowledgements ----------------------------------------------------------------------------------------


async def test_the_prefetch_limits_the_unacknowledged_deliveries(world: World) -> None:
    client, queue = await filled(world, 10)
    inbox = Inbox()
    await client.consume(queue, inbox, prefetch=3)
    await until(lambda: len(inbox) == 3, "the first three")
    await short_delay()
    assert len(inbox) == 3
    client.ack(inbox[:2])
    await until(lambda: len(inbox) == 5, "two more")
    await short_delay()
    assert len(inbox) == 5


@pytest.mark.parametrize(
    "acked",
    [
        pytest.param([[0, 1, 2, 3, 4, 5]], id="all at once"),
        pytest.param([[0, 1, 2], [3, 4]], id="prefix after prefix"),
        pytest.param([[4, 5]], id="the end alone"),
        pytest.param([[3, 4, 5], [0, 1], [2]], id="the end before the beginning"),
        pytest.param([[5, 1, 3], [4, 0]], id="in any order"),
        pytest.param([[0, 1], [0, 1], [1, 2]], id="some of them twice"),
        pytest.param([[2], [0, 2], [1, 0]], id="twice, and out of order"),
        pytest.param([[]], id="nothing"),
    ],
)
async def test_only_acknowledged_messages_are_removed(world: World, acked: list[list[int]]) -> None:
    client, queue = await filled(world, 6)
    inbox, rest = Inbox(), Inbox()
    consumer = await client.consume(queue, inbox, prefetch=6)
    await until(lambda: len(inbox) == 6, "all deliveries")
    deliveries = list(inbox)
    for indexes in acked:
        client.ack([deliveries[index] for index in indexes])
    await consumer.close()
    await client.consume(queue, rest, prefetch=6)
    left = [str(number).encode() for number in range(6) if number not in {index for each in acked for index in each}]
    await until(lambda: len(rest) >= len(left), "the rest")
    await short_delay()
    assert rest.bodies == left
    assert not any(client.is_void(delivery) for delivery in rest)


async def test_a_requeued_message_is_redelivered_and_marked(world: World) -> None:
    client, queue = await filled(world, 3)
    inbox = Inbox()
    await client.consume(queue, inbox, prefetch=3)
    await until(lambda: len(inbox) == 3, "all deliveries")
    client.requeue([inbox[1]])
    await until(lambda: len(inbox) == 4, "the redelivery")
    assert inbox[3].body == b"1"
    assert inbox[3].redelivered
    client.ack(inbox)
    await short_delay()
    assert len(inbox) == 4


async def test_a_message_that_was_requeued_too_often_is_dead_lettered(world: World) -> None:
    dead_queue = await new_queue(world)
    exchange = await new_exchange(world, "fanout", {dead_queue: ""})
    client, queue = await filled(world, 1, quorum=True, x_delivery_limit=2, x_dead_letter_exchange=exchange)
    inbox, dead = Inbox(), Inbox()
    await client.consume(queue, inbox, prefetch=1)
    await client.consume(dead_queue, dead, prefetch=1)
    for expected in (1, 2, 3):
        await until(partial(_holds, inbox, expected), "a delivery")
        client.requeue([inbox[-1]])
    await until(lambda: dead, "the dead letter")
    assert dead.bodies == [b"0"]
    assert len(inbox) == 3


def _holds(inbox: Inbox, count: int) -> bool:
    return len(inbox) == count


# --- a single active consumer -----------------------------------------------------------------------------


async def test_only_one_consumer_of_a_single_active_consumer_queue_gets_messages(world: World) -> None:
    first, queue = await filled(world, 4, quorum=True, x_single_active_consumer=True)
    second = await world.client()
    one, two = Inbox(), Inbox()
    await first.consume(queue, one, prefetch=2)
    await until(lambda: len(one) == 2, "deliveries")
    await second.consume(queue, two, prefetch=2)
    await short_delay()
    assert not two


async def test_the_next_consumer_takes_over_in_order_when_the_active_one_closes(world: World) -> None:
    first, queue = await filled(world, 4, quorum=True, x_single_active_consumer=True)
    second = await world.client()
    one, two = Inbox(), Inbox()
    consumer = await first.consume(queue, one, prefetch=2)
    await second.consume(queue, two, prefetch=10)
    await until(lambda: len(one) == 2, "deliveries")
    await consumer.close()
    await until(lambda: len(two) == 4, "the takeover")
    assert two.bodies == [b"0", b"1", b"2", b"3"]
    assert [delivery.redelivered for delivery in two] == [True, True, False, False]


async def test_the_next_consumer_takes_over_when_the_active_one_loses_its_connection(world: World) -> None:
    first, queue = await filled(world, 2, quorum=True, x_single_active_consumer=True)
    second = await world.client()
    one, two = Inbox(), Inbox()
    await first.consume(queue, one, prefetch=2)
    await second.consume(queue, two, prefetch=2)
    await until(lambda: len(one) == 2, "deliveries")
    world.cut(first)
    await until(lambda: len(two) == 2, "the takeover")
    assert [delivery.redelivered for delivery in two] == [True, True]
    world.mend(first)
    await until(lambda: first.connected, "the reconnect")
    await short_delay()
    assert len(one) == 2


# --- lost connections --------------------------------------------------------------------------------


async def test_deliveries_of_a_lost_connection_are_void_and_redelivered(world: World) -> None:
    client, queue = await filled(world, 3)
    inbox = Inbox()
    await client.consume(queue, inbox, prefetch=3)
    await until(lambda: len(inbox) == 3, "all deliveries")
    before = list(inbox)
    inbox.clear()
    client.ack([before[0]])
    await short_delay()
    world.cut(client)
    await until(lambda: not client.connected, "the cut")
    world.mend(client)
    await until(lambda: len(inbox) == 2, "the redeliveries")
    assert inbox.bodies == [b"1", b"2"]
    assert all(delivery.redelivered for delivery in inbox)
    assert all(client.is_void(delivery) for delivery in before)
    assert not any(client.is_void(delivery) for delivery in inbox)
    assert {delivery.channel for delivery in before}.isdisjoint({delivery.channel for delivery in inbox})


async def test_a_consumer_closed_without_a_connection_is_not_restored_with_the_next_one(world: World) -> None:
    client, queue = await filled(world, 2, quorum=True, x_single_active_consumer=True)
    gone, other = Inbox(), Inbox()
    consumer = await client.consume(queue, gone, prefetch=2)
    await until(lambda: len(gone) == 2, "deliveries")
    world.cut(client)
    await until(lambda: not client.connected, "the cut")
    await consumer.close()
    world.mend(client)
    await until(lambda: client.connected, "the reconnect")
    await short_delay()
    await (await world.client()).consume(queue, other, prefetch=2)
    await until(lambda: len(other) == 2, "the next consumer's deliveries")
    assert len(gone) == 2


async def test_acknowledging_a_void_delivery_does_nothing(world: World) -> None:
    client, queue = await filled(world, 1)
    inbox = Inbox()
    await client.consume(queue, inbox, prefetch=1)
    await until(lambda: inbox, "a delivery")
    world.cut(client)
    await until(lambda: not client.connected, "the cut")
    world.mend(client)
    await until(lambda: len(inbox) == 2, "the redelivery")
    client.ack([inbox[0]])
    client.requeue([inbox[0]])
    await short_delay()
    assert len(inbox) == 2
    assert not client.is_void(inbox[1])
    client.ack(inbox)
    await client.publish(to(queue, "next"))
    await until(lambda: len(inbox) == 3, "the next message")
    assert inbox.bodies == [b"0", b"0", b"next"]


async def test_publishing_fails_until_the_client_is_connected_again(world: World) -> None:
    client = await world.client()
    queue = await new_queue(world)
    world.cut(client)
    await until(lambda: not client.connected, "the cut")
    with pytest.raises(BrokerUnavailable):
        await client.publish(to(queue, "lost"))
    client.publish_nowait(to(queue, "lost, too"))
    world.mend(client)
    await until(lambda: client.connected, "the reconnect")
    inbox = Inbox()
    await client.consume(queue, inbox, prefetch=10)
    await client.publish(to(queue, "published"))
    await until(lambda: inbox, "a delivery")
    await short_delay()
    assert inbox.bodies == [b"published"]


async def test_consuming_without_a_connection_fails(world: World) -> None:
    client = await world.client()
    queue = await new_queue(world)
    world.cut(client)
    await until(lambda: not client.connected, "the cut")
    with pytest.raises(BrokerUnavailable):
        await client.consume(queue, Inbox(), prefetch=1)


async def test_the_unacknowledged_deliveries_of_a_closed_client_are_requeued(world: World) -> None:
    client, queue = await filled(world, 2)
    other = await world.client()
    inbox, rest = Inbox(), Inbox()
    await client.consume(queue, inbox, prefetch=2)
    await until(lambda: len(inbox) == 2, "all deliveries")
    client.ack([inbox[0]])
    await client.close()
    await other.consume(queue, rest, prefetch=2)
    await until(lambda: rest, "the rest")
    assert rest.bodies == [b"1"]
    assert not client.connected


# --- unroutable messages ------------------------------------------------------------------------------------


async def test_an_unroutable_message_that_must_arrive_counts_as_not_published(world: World) -> None:
    client = await world.client()
    queue = await new_queue(world)
    with pytest.raises(BrokerUnavailable):
        await client.publish([*to(queue, "fine"), *to(unique("missing"), "lost")])


async def test_a_message_for_a_deleted_inbox_counts_as_published(world: World) -> None:
    client = await world.client()
    await new_queue(world)
    await client.publish([Outgoing(INBOXES, unique("inbox"), b"[]")])


async def test_publishing_no_messages_does_nothing(world: World) -> None:
    client = await world.client()
    await client.publish([])
    client.publish_nowait([])


# --- inboxes ----------------------------------------------------------------------------------------------


async def test_an_inbox_receives_the_messages_with_its_name_as_routing_key(world: World) -> None:
    owner, sender = await world.client(), await world.client()
    await new_queue(world)
    mine, other = Inbox(), Inbox()
    name = unique("inbox")
    await owner.open_inbox(name, mine)
    await owner.open_inbox(unique("inbox"), other)
    await sender.publish([Outgoing(INBOXES, name, body, persistent=False) for body in (b"1", b"2")])
    await until(lambda: len(mine) == 2, "the messages")
    assert mine.bodies == [b"1", b"2"]
    assert not other


async def test_an_inbox_may_have_another_routing_key_which_the_next_owner_takes_over(world: World) -> None:
    first, second, sender = await world.client(), await world.client(), await world.client()
    await new_queue(world)
    one, two = Inbox(), Inbox()
    key = unique("inbox")
    consumer = await first.open_inbox(unique("inbox"), one, key=key)
    await sender.publish([Outgoing(INBOXES, key, b"1")])
    await until(lambda: one, "the first message")
    await consumer.close()
    await second.open_inbox(unique("inbox"), two, key=key)
    await sender.publish([Outgoing(INBOXES, key, b"2")])
    await until(lambda: two, "the second message")
    assert (one.bodies, two.bodies) == ([b"1"], [b"2"])


async def test_an_inbox_is_restored_after_a_lost_connection_without_the_messages_sent_meanwhile(world: World) -> None:
    owner, sender = await world.client(), await world.client()
    await new_queue(world)
    inbox = Inbox()
    name = unique("inbox")
    await owner.open_inbox(name, inbox)
    world.cut(owner)
    await until(lambda: not owner.connected, "the cut")
    await short_delay()
    await sender.publish([Outgoing(INBOXES, name, b"meanwhile")])
    world.mend(owner)
    await until(lambda: owner.connected, "the reconnect")
    await until(lambda: _sent(sender, name) and inbox, "a message after the reconnect")
    assert set(inbox.bodies) == {b"again"}


def _sent(sender: Broker, inbox: str) -> bool:
    sender.publish_nowait([Outgoing(INBOXES, inbox, b"again", persistent=False)])
    return True


async def test_acknowledging_or_requeueing_a_delivery_of_an_inbox_has_no_effect(world: World) -> None:
    owner, sender = await world.client(), await world.client()
    await new_queue(world)
    inbox = Inbox()
    name = unique("inbox")
    await owner.open_inbox(name, inbox)
    await sender.publish([Outgoing(INBOXES, name, body) for body in (b"1", b"2")])
    await until(lambda: len(inbox) == 2, "the messages")
    assert not any(delivery.needs_ack for delivery in inbox)
    owner.ack(inbox[:1])
    owner.requeue(inbox[1:])
    await short_delay()
    await sender.publish([Outgoing(INBOXES, name, b"3")])
    await until(lambda: len(inbox) == 3, "the next message")
    assert inbox.bodies == [b"1", b"2", b"3"]
    assert not any(owner.is_void(delivery) for delivery in inbox)


async def test_a_closed_inbox_receives_nothing(world: World) -> None:
    owner, sender = await world.client(), await world.client()
    await new_queue(world)
    inbox = Inbox()
    name = unique("inbox")
    consumer = await owner.open_inbox(name, inbox)
    await consumer.close()
    await sender.publish([Outgoing(INBOXES, name, b"late")])
    await short_delay()
    assert not inbox
