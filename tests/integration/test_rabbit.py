"""The broker adapter and the topology while RabbitMQ is down, restarts, or has conflicting queues."""

from __future__ import annotations

import asyncio

import pytest

from contract.adapters import Inbox
from sublet_platform.ports import Outgoing
from sublet_platform.rabbit.broker import Rabbit, declare, declare_topology
from sublet_protocol import ids
from sublet_protocol.topology import (
    DEAD,
    EVENTS,
    INGEST,
    QUERIES,
    QUERY_KEY,
    REQUESTS,
    TIMERS,
    WORKERS,
    Queue,
    Topology,
    bucket_key,
    pool_queue,
    shard_queue,
)
from support.polling import short_delay, until
from support.servers import RabbitServer

pytestmark = pytest.mark.real

SHARDS = 3


async def a_client(server: RabbitServer) -> Rabbit:
    rabbit = Rabbit(server.url)
    await rabbit.open()
    return rabbit


async def test_every_bucket_is_routed_to_its_shard_and_worker_messages_to_all_shards(own_rabbit: RabbitServer) -> None:
    await declare_topology(own_rabbit.url, SHARDS)
    client = await a_client(own_rabbit)
    inboxes = [Inbox() for _ in range(SHARDS)]
    for shard, inbox in enumerate(inboxes):
        await client.consume(shard_queue(shard), inbox, prefetch=1_000)
    slots = range(ids.BUCKETS)
    await client.publish([Outgoing(REQUESTS, bucket_key(slot), str(slot).encode()) for slot in slots])
    await client.publish([Outgoing(WORKERS, "", b"beat")])
    await until(lambda: sum(map(len, inboxes)) == len(slots) + SHARDS, "all deliveries")
    for shard, inbox in enumerate(inboxes):
        expected = [str(slot).encode() for slot in ids.buckets_of_shard(shard, SHARDS)]
        assert inbox.bodies == [*expected, b"beat"]
        client.ack(inbox)
    await client.close()


@pytest.mark.parametrize(
    ("exchange", "routing_key", "queue"),
    [
        (EVENTS, "order.paid.eu", INGEST),
        ("", INGEST, INGEST),
        ("", TIMERS, TIMERS),
        (REQUESTS, QUERY_KEY, QUERIES),
        (DEAD, "whatever", DEAD),
    ],
)
async def test_every_service_gets_its_messages(
    own_rabbit: RabbitServer, exchange: str, routing_key: str, queue: str
) -> None:
    await declare_topology(own_rabbit.url, SHARDS)
    client = await a_client(own_rabbit)
    inbox = Inbox()
    await client.consume(queue, inbox, prefetch=10)
    await client.publish([Outgoing(exchange, routing_key, b"{}")])
    await until(lambda: inbox, "a delivery")
    assert inbox[0].exchange == exchange
    client.ack(inbox)
    await client.close()


async def test_declaring_the_topology_again_changes_nothing(own_rabbit: RabbitServer) -> None:
    await declare_topology(own_rabbit.url, SHARDS)
    await declare_topology(own_rabbit.url, SHARDS)


async def test_an_existing_queue_with_other_arguments_is_an_error(own_rabbit: RabbitServer) -> None:
    await declare(own_rabbit.url, Topology((), (Queue("sublet.test.other"),), ()))
    with pytest.raises(ValueError, match=r"sublet\.test\.other"):
        await declare(own_rabbit.url, Topology((), (Queue("sublet.test.other", {"x-expires": 1_000}),), ()))


async def test_a_pool_queue_can_be_declared_by_every_worker(own_rabbit: RabbitServer) -> None:
    wanted = Topology((), (pool_queue("p-12345678", "task"), pool_queue("p-12345678", "durable")), ())
    await declare(own_rabbit.url, wanted)
    await declare(own_rabbit.url, wanted)


async def test_confirmed_messages_and_consumers_survive_the_kill_of_the_broker(own_rabbit: RabbitServer) -> None:
    await declare_topology(own_rabbit.url, SHARDS)
    client = await a_client(own_rabbit)
    inbox = Inbox()
    await client.consume(shard_queue(0), inbox, prefetch=2)
    await client.publish([Outgoing(REQUESTS, bucket_key(0), body) for body in (b"1", b"2", b"3")])
    await until(lambda: len(inbox) == 2, "deliveries")
    await asyncio.to_thread(own_rabbit.kill)
    await until(lambda: not client.connected, "the outage")
    assert all(client.is_void(delivery) for delivery in inbox)
    await asyncio.to_thread(own_rabbit.start)
    await until(lambda: len(inbox) == 4, "the redeliveries")
    assert inbox.bodies[2:] == [b"1", b"2"]
    assert all(delivery.redelivered for delivery in inbox[2:])
    client.ack(inbox)
    await until(lambda: len(inbox) == 5, "the last message")
    client.ack(inbox)
    await short_delay()
    await client.close()


async def test_clients_and_topology_wait_for_a_stopped_broker(own_rabbit: RabbitServer) -> None:
    await asyncio.to_thread(own_rabbit.stop)
    declaring = asyncio.create_task(declare_topology(own_rabbit.url, SHARDS))
    connecting = asyncio.create_task(a_client(own_rabbit))
    await short_delay()
    assert not declaring.done()
    assert not connecting.done()
    await asyncio.to_thread(own_rabbit.start)
    await declaring
    client = await connecting
    await client.publish([Outgoing("", TIMERS, b"[]")])
    await client.close()
