"""Faults that only the adapters in memory can inject: delays, outages at a chosen moment, lost answers."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from contract.adapters import Inbox
from contract.records import a_run
from sublet_platform.memory import MemoryBroker, MemoryCluster, MemoryDatabase, MemoryRunStore, MemoryTransport
from sublet_platform.ports import BrokerUnavailable, Outgoing, RevisionConflict, RunChange, StoreUnavailable
from sublet_protocol.topology import INBOXES, Queue
from support.clocks import ManualClock
from support.polling import short_delay, until
from support.virtual_time import in_virtual_time

QUEUE = "work"


def a_cluster(delays: Iterator[float] | None = None) -> MemoryCluster:
    cluster = MemoryCluster(latency=(lambda: next(delays)) if delays is not None else lambda: 0.0)
    cluster.declare_queue(Queue(QUEUE))
    return cluster


def to_queue(*bodies: str, persistent: bool = True) -> list[Outgoing]:
    return [Outgoing("", QUEUE, body.encode(), persistent) for body in bodies]


def endless(*delays: float) -> Iterator[float]:
    while True:
        yield from delays


# --- the broker -------------------------------------------------------------------------------------------


async def test_delays_do_not_change_the_order() -> None:
    client = MemoryBroker(a_cluster(endless(0.02, 0.0, 0.005)))
    inbox = Inbox()
    await client.consume(QUEUE, inbox, prefetch=100)
    await asyncio.gather(*(client.publish(to_queue(str(number))) for number in range(20)))
    await until(lambda: len(inbox) == 20, "all deliveries")
    assert inbox.bodies == [str(number).encode() for number in range(20)]


async def test_a_message_in_transit_on_a_closed_connection_is_lost_and_not_confirmed() -> None:
    cluster = a_cluster()
    client, other = MemoryBroker(cluster), MemoryBroker(cluster)
    inbox = Inbox()
    await other.consume(QUEUE, inbox, prefetch=10)
    publishing = asyncio.create_task(client.publish(to_queue("lost")))
    asyncio.get_running_loop().call_soon(client.kill_connection)
    with pytest.raises(BrokerUnavailable):
        await publishing
    await short_delay()
    assert not inbox
    assert client.connected


async def test_a_message_may_have_arrived_although_its_confirm_was_lost() -> None:
    cluster = a_cluster(endless(0.0, 0.05))
    client, other = MemoryBroker(cluster), MemoryBroker(cluster)
    publishing = asyncio.create_task(client.publish(to_queue("arrived")))
    await until(lambda: cluster.queues[QUEUE].ready, "the arrival")
    client.kill_connection()
    with pytest.raises(BrokerUnavailable):
        await publishing
    inbox = Inbox()
    await other.consume(QUEUE, inbox, prefetch=10)
    await until(lambda: inbox, "the message")


async def test_an_acknowledgement_in_transit_is_lost_with_the_connection() -> None:
    client = MemoryBroker(a_cluster())
    inbox = Inbox()
    await client.consume(QUEUE, inbox, prefetch=10)
    await client.publish(to_queue("1"))
    await until(lambda: inbox, "the delivery")
    client.ack(inbox)
    client.kill_connection()
    await until(lambda: len(inbox) == 2, "the redelivery")
    assert inbox[1].redelivered


async def test_a_killed_connection_reconnects_after_the_given_time() -> None:
    client = MemoryBroker(a_cluster())
    client.kill_connection(down_s=0.05)
    await asyncio.sleep(0)
    assert not client.connected
    await until(lambda: client.connected, "the reconnect")


async def test_a_broker_restart_loses_only_transient_messages() -> None:
    cluster = a_cluster()
    client = MemoryBroker(cluster)
    await client.publish([*to_queue("persistent"), *to_queue("transient", persistent=False)])
    cluster.stop()
    assert not client.connected
    await short_delay()
    assert not client.connected
    cluster.start()
    await until(lambda: client.connected, "the reconnect")
    inbox = Inbox()
    await client.consume(QUEUE, inbox, prefetch=10)
    await until(lambda: inbox, "the message")
    await short_delay()
    assert inbox.bodies == [b"persistent"]


@in_virtual_time
async def test_a_channel_with_an_overdue_delivery_is_closed_and_all_its_deliveries_are_requeued() -> None:
    cluster = a_cluster()
    cluster.declare_queue(Queue("patient", {"x-consumer-timeout": 3_600_000}))
    client = MemoryBroker(cluster)
    held, patiently = Inbox(), Inbox()
    await client.consume(QUEUE, held, prefetch=2)
    await client.consume("patient", patiently, prefetch=2)
    await client.publish([*to_queue("1"), Outgoing("", "patient", b"2")])
    await asyncio.sleep(1_000)
    await client.publish(to_queue("3"))
    cluster.time_out_deliveries()
    await asyncio.sleep(1)
    assert held.bodies == [b"1", b"3"], "half an hour is allowed"
    await asyncio.sleep(1_000)
    cluster.time_out_deliveries()
    await asyncio.sleep(1)
    assert held.bodies == [b"1", b"3", b"1", b"3"]
    assert [client.is_void(delivery) for delivery in held] == [True, True, False, False]
    assert all(delivery.redelivered for delivery in held[2:])
    assert patiently.bodies == [b"2"], "that queue allows an hour"


@in_virtual_time
async def test_a_worker_with_overdue_tickets_reconnects_and_gets_them_redelivered() -> None:
    cluster = a_cluster()
    worker = MemoryTransport(cluster)
    tickets: list[Any] = []
    inbox: list[bytes] = []
    reconnects: list[bool] = []
    worker.on_reconnect(lambda: reconnects.append(worker.connected))
    await worker.open_inbox("inbox", inbox.append)
    await worker.consume_pool("pool", 1, tickets.append)
    await worker.publish("", "pool", b"ticket")
    await asyncio.sleep(10)
    cluster.time_out_deliveries(held_s=5)
    await asyncio.sleep(1)
    assert reconnects == [True]
    assert [ticket.body for ticket in tickets] == [b"ticket", b"ticket"]
    worker.ack(tickets[0])
    await worker.publish(INBOXES, "inbox", b"hello")
    await asyncio.sleep(1)
    assert inbox == [b"hello"]
    assert len(cluster.queues["pool"].subscriptions[0].unacked) == 1, "an acknowledgement on a dead channel counts not"


# --- the database -----------------------------------------------------------------------------------------


def a_store() -> tuple[MemoryDatabase, MemoryRunStore]:
    database = MemoryDatabase()
    return database, MemoryRunStore(database, ManualClock())


async def unavailable(operation: str) -> None:
    raise StoreUnavailable(operation)


async def available(operation: str) -> None:
    return


async def test_a_write_that_fails_before_it_takes_effect_changes_nothing() -> None:
    database, store = a_store()
    database.before = unavailable
    with pytest.raises(StoreUnavailable, match="commit"):
        await store.commit([RunChange(None, a_run())])
    database.before = available
    assert await store.load_runs(["run-1"]) == []


async def test_a_write_whose_answer_is_lost_has_taken_effect() -> None:
    database, store = a_store()
    database.after = unavailable
    with pytest.raises(StoreUnavailable):
        await store.commit([RunChange(None, a_run())])
    database.after = available
    with pytest.raises(RevisionConflict):
        await store.commit([RunChange(None, a_run())])
    assert await store.load_runs(["run-1"]) == [a_run()]


async def test_all_stores_of_a_database_share_its_contents() -> None:
    database, store = a_store()
    await store.commit([RunChange(None, a_run())])
    assert await MemoryRunStore(database, ManualClock()).load_runs(["run-1"]) == [a_run()]
