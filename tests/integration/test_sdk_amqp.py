"""The SDK's transport with a real RabbitMQ: broken connections, missing exchanges, a stopped broker."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import aio_pika
import pytest

from sublet._amqp.adapter import AmqpTransport
from sublet._amqp.transport import TicketDelivery
from sublet._errors import TransportUnavailable
from support.servers import RabbitServer

pytestmark = pytest.mark.real

T = TypeVar("T")

POOL = "sublet.pool.p-12345678.task"
INBOX = "sublet.inbox.worker.w1"


@pytest.fixture(scope="module")
def rabbit(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RabbitServer]:
    # A server for this module, because these tests close every connection and stop the broker.
    server = RabbitServer(Path(tmp_path_factory.mktemp("rabbit")))
    server.start()
    try:
        yield server
    finally:
        server.stop()


class Proxy:
    """A TCP relay in front of the broker that can cut connections and refuse new ones."""

    def __init__(self, target_port: int) -> None:
        self._target_port = target_port
        self._writers: set[asyncio.StreamWriter] = set()
        self._server: asyncio.Server | None = None
        self._thawed = asyncio.Event()
        self._thawed.set()
        self.port = 0

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._relay, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    @property
    def url(self) -> str:
        return f"amqp://guest:guest@127.0.0.1:{self.port}/"

    def freeze(self) -> None:
        """Forward nothing more, and leave the connections open."""
        self._thawed.clear()

    def cut(self) -> None:
        self._thawed.set()
        for writer in self._writers:
            writer.transport.abort()

    async def refuse(self) -> None:
        assert self._server is not None
        self._server.close()
        self.cut()
        await asyncio.sleep(0)

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        up_reader, up_writer = await asyncio.open_connection("127.0.0.1", self._target_port)
        self._writers |= {writer, up_writer}
        await asyncio.gather(self._pump(reader, up_writer), self._pump(up_reader, writer))
        self._writers -= {writer, up_writer}

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65_536):
                await self._thawed.wait()
                writer.write(data)
                await writer.drain()
        writer.close()


class Admin:
    """Declares exchanges and queues, as the services do, and reads messages."""

    def __init__(self, channel: aio_pika.abc.AbstractChannel) -> None:
        self.channel = channel

    async def exchange(self, name: str, type_: str = "direct") -> aio_pika.abc.AbstractExchange:
        return await self.channel.declare_exchange(name, type_, durable=True)

    async def bound(self, queue: str, exchange: str, key: str, type_: str = "direct") -> aio_pika.abc.AbstractQueue:
        declared = await self.channel.declare_queue(queue, durable=True)
        await declared.bind(await self.exchange(exchange, type_), key)
        return declared

    async def put(self, exchange: str, key: str, body: bytes) -> None:
        target = self.channel.default_exchange if not exchange else await self.channel.get_exchange(exchange)
        await target.publish(aio_pika.Message(body), key)

    async def take(self, queue: aio_pika.abc.AbstractQueue) -> aio_pika.abc.AbstractIncomingMessage:
        async def one() -> aio_pika.abc.AbstractIncomingMessage:
            message = await queue.get(no_ack=True, fail=False)
            assert message is not None
            return message

        return await eventually(one)


async def eventually(look: Callable[[], Awaitable[T]], within_s: float = 30.0) -> T:
    async with asyncio.timeout(within_s):
        while True:
            with contextlib.suppress(AssertionError):
                return await look()
            await asyncio.sleep(0.05)


@pytest.fixture
async def admin(rabbit: RabbitServer) -> AsyncIterator[Admin]:
    """An admin of a broker without exchanges and queues."""
    connection = await aio_pika.connect(rabbit.url)
    async with connection:
        for queue in (POOL, "requests"):
            channel = await connection.channel()
            await channel.queue_delete(queue)
        for exchange in ("sublet.requests", "sublet.inboxes", "sublet.events"):
            await channel.exchange_delete(exchange)
        yield Admin(await connection.channel())


@pytest.fixture
async def proxy(rabbit: RabbitServer) -> AsyncIterator[Proxy]:
    proxy = Proxy(rabbit.port)
    await proxy.start()
    yield proxy
    await proxy.refuse()


@pytest.fixture
async def transport(proxy: Proxy) -> AsyncIterator[AmqpTransport]:
    transport = AmqpTransport(proxy.url, publish_timeout_s=20.0)
    await transport.connect()
    yield transport
    await transport.close()


class Tickets:
    """Collects the tickets of a pool."""

    def __init__(self) -> None:
        self.out: list[TicketDelivery] = []

    async def until(self, count: int) -> list[TicketDelivery]:
        async def enough() -> list[TicketDelivery]:
            assert len(self.out) >= count
            return self.out

        return await eventually(enough)


async def test_a_published_message_arrives_with_its_id_headers_and_persistence(
    admin: Admin, transport: AmqpTransport
) -> None:
    queue = await admin.bound("requests", "sublet.requests", "bucket.00")
    await transport.publish(
        "sublet.requests", "bucket.00", b"[1]", message_id="m1", headers={"scope": "s", "priority": 3}
    )
    message = await admin.take(queue)
    assert (message.body, message.message_id, message.content_type) == (b"[1]", "m1", "application/json")
    assert dict(message.headers) == {"scope": "s", "priority": 3}
    assert message.delivery_mode == aio_pika.DeliveryMode.PERSISTENT


async def test_many_concurrent_publishes_are_confirmed_together(admin: Admin, transport: AmqpTransport) -> None:
    queue = await admin.bound("requests", "sublet.requests", "bucket.00")
    await asyncio.gather(*(transport.publish("sublet.requests", "bucket.00", b"%d" % n) for n in range(500)))
    assert [(await admin.take(queue)).body for _ in range(500)] == [b"%d" % n for n in range(500)]


async def test_a_publish_to_a_missing_exchange_waits_until_the_services_declare_it(
    admin: Admin, transport: AmqpTransport
) -> None:
    publishing = asyncio.create_task(transport.publish("sublet.requests", "bucket.00", b"[]"))
    await asyncio.sleep(0.5)
    assert not publishing.done()
    queue = await admin.bound("requests", "sublet.requests", "bucket.00")
    await publishing
    assert (await admin.take(queue)).body == b"[]"


async def test_an_unroutable_publish_raises(admin: Admin, proxy: Proxy) -> None:
    await admin.exchange("sublet.requests")
    transport = AmqpTransport(proxy.url, publish_timeout_s=0.5)
    await transport.connect()
    with pytest.raises(TransportUnavailable, match=r"no queue takes 'bucket.00' from exchange sublet.requests"):
        await transport.publish("sublet.requests", "bucket.00", b"[]")
    await transport.close()


async def test_a_publish_timeout_names_the_missing_exchange(admin: Admin, proxy: Proxy) -> None:
    transport = AmqpTransport(proxy.url, publish_timeout_s=0.5)
    await transport.connect()
    with pytest.raises(TransportUnavailable, match=r"there is no exchange sublet.events: is a scheduler running"):
        await transport.publish("sublet.events", "k", b"{}")
    await transport.close()


async def test_unconfirmed_publishes_of_a_broken_connection_are_published_again(
    admin: Admin, proxy: Proxy, transport: AmqpTransport
) -> None:
    queue = await admin.bound("requests", "sublet.requests", "bucket.00")
    await transport.publish("sublet.requests", "bucket.00", b"first")
    publishing = [asyncio.create_task(transport.publish("sublet.requests", "bucket.00", b"%d" % n)) for n in range(200)]
    await asyncio.sleep(0)
    proxy.cut()
    await asyncio.gather(*publishing)
    arrived = set()

    async def all_there() -> None:
        while message := await queue.get(no_ack=True, fail=False):
            arrived.add(message.body)
        assert arrived >= {b"%d" % n for n in range(200)}

    await eventually(all_there)


async def test_messages_in_a_dead_socket_are_published_again_on_a_new_connection(
    admin: Admin, proxy: Proxy, transport: AmqpTransport
) -> None:
    queue = await admin.bound("requests", "sublet.requests", "bucket.00")
    tickets = Tickets()
    await transport.consume_pool(POOL, 50, tickets.out.append)
    for n in range(50):
        await admin.put("", POOL, b"%d" % n)
    await tickets.until(50)
    proxy.freeze()
    large = b"x" * 262_144
    publishing = [asyncio.create_task(transport.publish("sublet.requests", "bucket.00", large)) for _ in range(100)]
    await asyncio.sleep(0.5)  # the socket's buffers are full now
    for ticket in tickets.out:
        transport.ack(ticket)
    await asyncio.sleep(0.2)
    proxy.cut()
    await asyncio.gather(*publishing)
    for ticket in (await tickets.until(100))[50:]:
        transport.ack(ticket)
    await transport.close()
    assert (await admin.channel.get_queue(POOL)).declaration_result.message_count == 0
    await queue.purge()


async def test_a_cancelled_publish_is_cancelled(admin: Admin, transport: AmqpTransport) -> None:
    publishing = asyncio.create_task(transport.publish("sublet.requests", "bucket.00", b"[]"))
    await asyncio.sleep(0.2)
    publishing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await publishing


async def test_an_inbox_receives_messages_and_is_restored_after_a_broken_connection(
    admin: Admin, proxy: Proxy, transport: AmqpTransport
) -> None:
    await admin.exchange("sublet.inboxes")
    got: list[bytes] = []
    reconnected = asyncio.Event()
    transport.on_reconnect(reconnected.set)
    await transport.open_inbox(INBOX, got.append)
    await admin.put("sublet.inboxes", INBOX, b"1")
    proxy.cut()
    await asyncio.wait_for(reconnected.wait(), 30)
    await admin.put("sublet.inboxes", INBOX, b"2")

    async def both() -> None:
        assert got[-1:] == [b"2"]

    await eventually(both)


async def test_an_inbox_waits_for_its_exchange_and_logs_it(
    admin: Admin, transport: AmqpTransport, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "sublet"):
        opening = asyncio.create_task(transport.open_inbox(INBOX, lambda body: None))
        await asyncio.sleep(0.3)
        assert not opening.done()
    assert "waiting for exchange sublet.inboxes: is a scheduler running?" in caplog.text
    await admin.exchange("sublet.inboxes")
    await asyncio.wait_for(opening, 10)


async def test_a_pool_delivers_no_more_tickets_than_there_are_slots(admin: Admin, transport: AmqpTransport) -> None:
    tickets = Tickets()
    await transport.consume_pool(POOL, 2, tickets.out.append)
    for n in range(4):
        await admin.put("", POOL, b"%d" % n)
    await tickets.until(2)
    await asyncio.sleep(0.2)
    assert [ticket.body for ticket in tickets.out] == [b"0", b"1"]
    transport.ack(tickets.out[0])
    assert (await tickets.until(3))[2].body == b"2"


async def test_two_pools_have_their_own_slots(admin: Admin, transport: AmqpTransport) -> None:
    tickets, durable = Tickets(), Tickets()
    await transport.consume_pool(POOL, 1, tickets.out.append)
    await transport.consume_pool("sublet.pool.p-12345678.durable", 2, durable.out.append)
    for n in range(3):
        await admin.put("", POOL, b"t%d" % n)
        await admin.put("", "sublet.pool.p-12345678.durable", b"d%d" % n)
    await durable.until(2)
    await asyncio.sleep(0.2)
    assert (len(tickets.out), len(durable.out)) == (1, 2)


async def test_a_repeated_acknowledgement_has_no_effect(admin: Admin, transport: AmqpTransport) -> None:
    tickets = Tickets()
    await transport.consume_pool(POOL, 1, tickets.out.append)
    await admin.put("", POOL, b"1")
    (first,) = await tickets.until(1)
    transport.ack(first)
    transport.ack(first)
    transport.requeue(first)
    await admin.put("", POOL, b"2")
    second = (await tickets.until(2))[1]
    assert (second.body, second.redelivered) == (b"2", False)
    assert second.channel == first.channel


async def test_a_ticket_requeued_comes_again(admin: Admin, transport: AmqpTransport) -> None:
    tickets = Tickets()
    await transport.consume_pool(POOL, 1, tickets.out.append)
    await admin.put("", POOL, b"1")
    (first,) = await tickets.until(1)
    transport.requeue(first)
    again = (await tickets.until(2))[1]
    assert (again.body, again.redelivered) == (b"1", True)


async def test_tickets_of_a_broken_connection_are_void_and_are_redelivered_on_another_channel(
    admin: Admin, proxy: Proxy, transport: AmqpTransport
) -> None:
    tickets = Tickets()
    await transport.consume_pool(POOL, 2, tickets.out.append)
    await admin.put("", POOL, b"1")
    (old,) = await tickets.until(1)
    proxy.cut()
    new = (await tickets.until(2))[1]
    assert (new.body, new.redelivered) == (b"1", True)
    assert new.channel != old.channel
    transport.ack(old)
    transport.requeue(old)
    await admin.put("", POOL, b"2")
    await tickets.until(3)
    transport.ack(new)
    await asyncio.sleep(0.2)
    assert transport.connected
    assert len(tickets.out) == 3


async def test_a_cancelled_pool_consumer_gets_no_tickets_and_may_still_acknowledge(
    admin: Admin, transport: AmqpTransport
) -> None:
    tickets = Tickets()
    pool = await transport.consume_pool(POOL, 5, tickets.out.append)
    await admin.put("", POOL, b"1")
    (ticket,) = await tickets.until(1)
    await pool.cancel()
    await admin.put("", POOL, b"2")
    await asyncio.sleep(0.2)
    assert len(tickets.out) == 1
    transport.ack(ticket)
    await transport.close()
    queue = await admin.channel.get_queue(POOL)
    assert queue.declaration_result.message_count == 1


async def test_acknowledgements_just_before_the_close_are_sent(admin: Admin, transport: AmqpTransport) -> None:
    tickets = Tickets()
    await transport.consume_pool(POOL, 100, tickets.out.append)
    for n in range(100):
        await admin.put("", POOL, b"%d" % n)
    for ticket in list(await tickets.until(100)):
        transport.ack(ticket)
    await transport.close()
    queue = await admin.channel.get_queue(POOL)
    assert queue.declaration_result.message_count == 0


async def test_a_unconfirmed_message_arrives_and_one_that_nobody_wants_is_harmless(
    admin: Admin, transport: AmqpTransport
) -> None:
    await admin.exchange("sublet.inboxes")
    got: list[bytes] = []
    await transport.open_inbox(INBOX, got.append)
    transport.publish_nowait("sublet.inboxes", "nobody", b"0")
    transport.publish_nowait("sublet.nowhere", "nobody", b"0")
    transport.publish_nowait("sublet.inboxes", INBOX, b"1")

    async def there() -> None:
        assert got == [b"1"]

    await eventually(there)


async def test_a_pool_queue_that_is_deleted_is_declared_again(admin: Admin, transport: AmqpTransport) -> None:
    tickets = Tickets()
    await transport.consume_pool(POOL, 1, tickets.out.append)
    reconnected = asyncio.Event()
    transport.on_reconnect(reconnected.set)
    await admin.channel.queue_delete(POOL)
    await asyncio.wait_for(reconnected.wait(), 30)
    await admin.put("", POOL, b"1")
    await tickets.until(1)


async def test_connecting_waits_for_a_stopped_broker(rabbit: RabbitServer) -> None:
    proxy = Proxy(rabbit.port)
    await proxy.start()
    await proxy.refuse()
    transport = AmqpTransport(proxy.url)
    connecting = asyncio.create_task(transport.connect())
    await asyncio.sleep(0.3)
    assert not connecting.done()
    await proxy.start()
    await asyncio.wait_for(connecting, 30)
    assert transport.connected
    await transport.close()
    await proxy.refuse()


async def test_a_wrong_password_raises_at_once(rabbit: RabbitServer) -> None:
    transport = AmqpTransport(f"amqp://guest:wrong@127.0.0.1:{rabbit.port}/")
    with pytest.raises(TransportUnavailable, match="refuses this user or password") as caught:
        await transport.connect()
    assert "wrong" not in str(caught.value)


async def test_a_closed_transport_refuses_to_publish(admin: Admin, transport: AmqpTransport) -> None:
    await transport.close()
    with pytest.raises(TransportUnavailable, match="closed by this program"):
        await transport.publish("sublet.requests", "bucket.00", b"[]")


async def test_the_transport_recovers_when_the_broker_closes_all_connections(
    rabbit: RabbitServer, admin: Admin
) -> None:
    await _assert_recovers(rabbit, admin, lambda: rabbit.ctl("close_all_connections", "test"))


async def test_the_transport_recovers_when_the_broker_is_killed_and_restarted(
    rabbit: RabbitServer, admin: Admin
) -> None:
    def kill() -> None:
        rabbit.kill()
        rabbit.start()

    await _assert_recovers(rabbit, admin, kill)


async def _assert_recovers(rabbit: RabbitServer, admin: Admin, fault: Callable[[], Any]) -> None:
    await admin.bound("requests", "sublet.requests", "bucket.00")
    await admin.exchange("sublet.inboxes")
    transport = AmqpTransport(rabbit.url, publish_timeout_s=120)
    await transport.connect()
    tickets, inbox, reconnected = Tickets(), list[bytes](), asyncio.Event()
    transport.on_reconnect(reconnected.set)
    await transport.open_inbox(INBOX, inbox.append)
    await transport.consume_pool(POOL, 1, tickets.out.append)
    injecting = asyncio.create_task(asyncio.to_thread(fault))
    for n in range(50):
        await transport.publish("sublet.requests", "bucket.00", b"%d" % n)
        await asyncio.sleep(0.02)
    await injecting
    await asyncio.wait_for(reconnected.wait(), 60)
    connection = await aio_pika.connect(rabbit.url)
    async with connection:
        fresh = Admin(await connection.channel())
        queue = await fresh.channel.get_queue("requests")
        assert queue.declaration_result.message_count is not None
        assert queue.declaration_result.message_count >= 50
        await fresh.put("sublet.inboxes", INBOX, b"hello")
        await fresh.put("", POOL, b"1")
        await tickets.until(1)

        async def greeted() -> None:
            assert inbox == [b"hello"]

        await eventually(greeted)
    await transport.close()
