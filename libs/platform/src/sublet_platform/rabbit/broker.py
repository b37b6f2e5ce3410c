"""RabbitMQ: the `Broker` port over FastStream and aio-pika, and the declaration of the topology.

Consuming goes through FastStream subscribers without dependency injection, decoding or automatic acknowledgement,
each on a channel of its own (that is what makes its prefetch hold). Publishing goes straight to two channels: one
with confirms, which are pipelined, and one without, for hints.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from functools import partial
from itertools import cycle
from typing import Any, cast
from urllib.parse import unquote

import aio_pika
import aiormq
from aio_pika.abc import AbstractConnection, AbstractRobustChannel, AbstractRobustConnection
from aio_pika.exceptions import AMQPError, ChannelNotFoundEntity, ChannelPreconditionFailed, DeliveryError
from aiormq.abc import ChannelFrame
from faststream import AckPolicy
from faststream.rabbit import Channel, ExchangeType, RabbitBroker, RabbitExchange, RabbitQueue
from faststream.rabbit.subscriber.usecase import RabbitSubscriber
from pamqp.body import ContentBody
from pamqp.header import ContentHeader
from yarl import URL

from sublet_platform.compatibility import check_virtual_host
from sublet_platform.ports import BrokerUnavailable, Delivery, Handler, Outgoing
from sublet_platform.rabbit.acks import AckTracker
from sublet_platform.rabbit.decoding import lenient_decoding
from sublet_platform.rabbit.failover import NodeConnection, nodes_of
from sublet_protocol import limits
from sublet_protocol.addresses import CONNECT_TIMEOUT_S
from sublet_protocol.backoff import Backoff
from sublet_protocol.topology import FORMAT_MARKER, INBOXES, MUST_ARRIVE, REQUESTS, Topology, topology

log = logging.getLogger(__name__)

RECONNECT_INTERVAL_S = 1.0
CONFIRM_TIMEOUT_S = 10.0
"""A majority of a healthy cluster confirms within milliseconds; a blocked broker (no disk, no memory) never does."""
UNCONFIRMED_AT_ONCE = 100
"""Written together."""
REQUEST_TIMEOUT_S = 10.0
"""Starting or ending a consumer."""

_UNREACHABLE = (AMQPError, OSError, RuntimeError, asyncio.InvalidStateError, asyncio.CancelledError)
"""What a publish raises when connection or channel go away under it. The cancellation is aiormq's, of its own tasks."""
_TRANSIENT, _PERSISTENT = 1, 2


class _DistinctQueue(RabbitQueue):
    """FastStream remembers declared queues by name, with their channel: a second consumer of a queue would then share
    the first one's channel, or get its closed one. Every instance is a queue of its own here."""

    def __hash__(self) -> int:
        return id(self)

    def __eq__(self, other: object) -> bool:
        return self is other


class ChannelAcks:
    """One AMQP channel, and what is settled on it. Deliveries carry it as their channel."""

    def __init__(self, channel: aiormq.Channel) -> None:
        self.channel = channel
        self.ack_tracker = AckTracker()
        self._frames: deque[tuple[int, bool, bool]] = deque()
        self._sending = False

    def settle(self, tags: list[int], *, ack: bool) -> bool:
        """Note what is to be sent; True if :meth:`send` must be started for it."""
        self._frames.extend((tag, multiple, ack) for tag, multiple in self.ack_tracker.settle(tags))
        start = bool(self._frames) and not self._sending
        self._sending = self._sending or start
        return start

    async def send(self) -> None:
        """One sender at a time, in order: a tag that comes after a frame that covers it would close the channel."""
        try:
            while self._frames:
                tag, multiple, ack = self._frames.popleft()
                # The queue to a socket that died may be full for ever.
                async with asyncio.timeout(REQUEST_TIMEOUT_S):
                    if ack:
                        await self.channel.basic_ack(tag, multiple=multiple, wait=False)
                    else:
                        await self.channel.basic_nack(tag, multiple=multiple, requeue=True, wait=False)
        except _UNREACHABLE as error:
            self._frames.clear()
            log.debug("settlements lost, the messages come again: %r", error)
            await self._give_up(error)
        finally:
            self._sending = False

    async def _give_up(self, error: BaseException) -> None:
        """Close the channel if it is not: what was not settled would stay with us for ever."""
        with contextlib.suppress(*_UNREACHABLE):
            await self.channel.close(AMQPError(f"not settled: {error!r}"), timeout=REQUEST_TIMEOUT_S)


class RabbitConsumer:
    """See `ports.Consumer`."""

    def __init__(self, rabbit: Rabbit, subscriber: RabbitSubscriber, channel: Channel) -> None:
        self._rabbit = rabbit
        self._subscriber = subscriber
        self._channel = channel

    async def close(self) -> None:
        # Not cancelled first: the next consumer of a single-active-consumer queue would be served at once, before
        # what this one has in hand is back in its place.
        self._subscriber.running = False
        await self._rabbit.close_channel(self._channel)
        await self._rabbit.stop_subscriber(self._subscriber)


class Rabbit:
    """See `ports.Broker`. ``url`` may name several nodes of a cluster, with commas between them: they are tried in
    turn. ``faststream`` is the broker to build a FastStream app around; ``on_published(seconds)`` is told how long each
    call of `publish` took."""

    def __init__(self, url: str, *, name: str = "sublet", on_published: Callable[[float], None] | None = None) -> None:
        lenient_decoding()
        self._on_published = on_published
        urls = nodes_of(url)
        self.faststream = RabbitBroker(
            urls[0],
            apply_types=False,
            logger=None,
            ack_policy=AckPolicy.MANUAL,
            fail_fast=False,
            timeout=CONNECT_TIMEOUT_S,
            reconnect_interval=RECONNECT_INTERVAL_S,
            graceful_timeout=None,
            default_channel=Channel(on_return_raises=True),
            app_id=name,
        )
        # FastStream has no word for several nodes; what stands here goes to aio-pika as it is.
        self.faststream._connection_kwargs["connection_class"] = partial(NodeConnection, urls=urls)
        self._connection: AbstractRobustConnection | None = None
        self._confirmed: AbstractRobustChannel | None = None
        self._unconfirmed: AbstractRobustChannel | None = None
        self._unconfirmed_until = 0.0
        self._waiting_unconfirmed: deque[Outgoing] = deque()
        self._tasks: set[asyncio.Task[None]] = set()
        self._opened: dict[Channel, AbstractRobustChannel] = {}
        self._closing_later: set[asyncio.Task[None]] = set()
        self._sending_unconfirmed = False

    async def open(self) -> None:
        """Connect, and open the channels for publishing, once. Waits for as long as the broker is away."""
        if self._unconfirmed is not None:
            return
        self._connection = await self.faststream.connect()
        self._confirmed = await self._connection.channel(on_return_raises=True)
        await self._renew_unconfirmed()

    async def _renew_unconfirmed(self) -> None:
        assert self._connection is not None  # by open
        old, self._unconfirmed = self._unconfirmed, await self._connection.channel(publisher_confirms=False)
        self._unconfirmed_until = asyncio.get_running_loop().time() + limits.UNCONFIRMED_CHANNEL_S
        if old is not None:
            await old.close()

    @property
    def connected(self) -> bool:
        connection = self._connection
        return connection is not None and not connection.is_closed and connection.connected.is_set()

    async def close(self) -> None:
        for later in self._closing_later:
            later.cancel()
        await self._drain_tasks()
        for channel in (self._confirmed, self._unconfirmed):
            if channel is not None and self.connected:
                await channel.close()
        await self.faststream.stop()
        self._connection = self._confirmed = self._unconfirmed = None

    # --- consuming ----------------------------------------------------------------------------------------

    async def consume(self, queue: str, handler: Handler, *, prefetch: int) -> RabbitConsumer:
        channel = Channel(prefetch_count=prefetch)
        subscriber = self.faststream.subscriber(
            _DistinctQueue(queue, declare=False),
            channel=channel,
            ack_policy=AckPolicy.MANUAL,
            decoder=_as_it_is,
            no_reply=True,
            persistent=False,
            title=queue,
        )
        return await self._start(subscriber, channel, handler)

    async def open_inbox(self, name: str, handler: Handler, *, key: str | None = None) -> RabbitConsumer:
        channel = Channel()
        subscriber = self.faststream.subscriber(
            _DistinctQueue(name, durable=False, exclusive=True, auto_delete=True, routing_key=key or name),
            RabbitExchange(INBOXES, type=ExchangeType.DIRECT, durable=True, declare=False),
            channel=channel,
            ack_policy=AckPolicy.ACK_FIRST,
            decoder=_as_it_is,
            no_reply=True,
            persistent=False,
            include_in_schema=False,
        )
        return await self._start(subscriber, channel, handler)

    async def _start(self, subscriber: RabbitSubscriber, channel: Channel, handler: Handler) -> RabbitConsumer:
        subscriber(_receiver(handler))
        # FastStream drops deliveries that arrive before its own start has returned, and some do.
        subscriber.running = True
        try:
            await self._request(self._open_channel(channel))
            await self._request(subscriber.start())
        except BrokerUnavailable:
            await self.stop_subscriber(subscriber)
            await self.close_channel(channel)
            raise
        return RabbitConsumer(self, subscriber, channel)

    async def _open_channel(self, channel: Channel) -> None:
        self._opened[channel] = await self.faststream.config.channel_manager.get_channel(channel)

    async def _request(self, call: Coroutine[Any, Any, None]) -> None:
        if not self.connected:
            call.close()
            raise BrokerUnavailable("not connected")
        try:
            async with asyncio.timeout(REQUEST_TIMEOUT_S):
                await call
        except (AMQPError, OSError, RuntimeError) as error:
            raise BrokerUnavailable(str(error) or type(error).__name__) from error
        except asyncio.CancelledError as error:
            _raise_if_cancelled()
            raise BrokerUnavailable("the channel was lost") from error

    async def stop_subscriber(self, subscriber: RabbitSubscriber) -> None:
        """No new deliveries."""
        try:
            await self._request(subscriber.stop())
        except BrokerUnavailable as error:
            log.debug("consumer not cancelled: %s", error)

    async def close_channel(self, channel: Channel) -> None:
        """What is unacknowledged on it goes back to its queue."""
        opened = self._opened.pop(channel, None)
        if opened is None:
            return
        if self.connected:
            await self._drain_tasks()
        if not await self._closed(opened):
            later = asyncio.get_running_loop().create_task(self._close_later(opened))
            self._closing_later.add(later)
            later.add_done_callback(self._closing_later.discard)

    async def _closed(self, opened: AbstractRobustChannel) -> bool:
        """Also while there is no connection: it tells the channel not to come back with the next one."""
        connected = self.connected
        try:
            async with asyncio.timeout(REQUEST_TIMEOUT_S):
                await opened.close()
        except _UNREACHABLE as error:
            _raise_if_cancelled()
            log.debug("channel not closed: %r", error)
            return False
        return connected

    async def _close_later(self, opened: AbstractRobustChannel) -> None:
        """It may have been about to come back already. Nobody serves its consumer any more: on a queue with a single
        active consumer everybody would wait behind it."""
        while not await self._closed(opened):  # noqa: ASYNC110  # it has to be asked
            await asyncio.sleep(RECONNECT_INTERVAL_S)

    def ack(self, deliveries: Sequence[Delivery]) -> None:
        for ledger, tags in _by_channel(deliveries).items():
            if ledger.settle(tags, ack=True):
                self._soon(ledger.send())

    def requeue(self, deliveries: Sequence[Delivery]) -> None:
        for ledger, tags in _by_channel(deliveries).items():
            if ledger.settle(tags, ack=False):
                self._soon(ledger.send())

    def is_void(self, delivery: Delivery) -> bool:
        return _acks_of(delivery).channel.is_closed

    def _soon(self, call: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(call)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _drain_tasks(self) -> None:
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # --- publishing ---------------------------------------------------------------------------------------

    async def publish(self, messages: Sequence[Outgoing]) -> None:
        if not messages:
            return
        if self._confirmed is None or not self.connected:
            raise BrokerUnavailable("not connected")
        loop = asyncio.get_running_loop()
        began = loop.time()
        try:
            async with asyncio.timeout(CONFIRM_TIMEOUT_S):
                channel = await _opened(self._confirmed)
                # Tasks start in this order and so the messages go out in it; the confirms are awaited together.
                outcomes = await asyncio.gather(
                    *(_publish(channel, message, mandatory=message.exchange in MUST_ARRIVE) for message in messages),
                    return_exceptions=True,
                )
                if any(type(outcome) is DeliveryError for outcome in outcomes):
                    # It would refuse the next ones too, see limits.HINTS_CHANNEL_S. The robust channel opens another.
                    await channel.close(AMQPError("a message was refused"))
        except TimeoutError as error:
            raise BrokerUnavailable(f"not confirmed within {CONFIRM_TIMEOUT_S:g} s") from error
        except (AMQPError, OSError, RuntimeError) as error:
            raise BrokerUnavailable(str(error) or type(error).__name__) from error
        if self._on_published is not None:
            self._on_published(loop.time() - began)
        for outcome in outcomes:
            if isinstance(outcome, _UNREACHABLE):
                raise BrokerUnavailable(f"not confirmed: {outcome!r}") from outcome
            if isinstance(outcome, BaseException):
                raise outcome

    def publish_nowait(self, messages: Sequence[Outgoing]) -> None:
        self._waiting_unconfirmed.extend(messages)
        if not self._sending_unconfirmed:
            self._sending_unconfirmed = True
            self._soon(self._send_unconfirmed_messages())

    async def _send_unconfirmed_messages(self) -> None:
        try:
            if self._unconfirmed is None or not self.connected:
                raise BrokerUnavailable("not connected")
            async with asyncio.timeout(CONFIRM_TIMEOUT_S):
                if asyncio.get_running_loop().time() > self._unconfirmed_until:
                    await self._renew_unconfirmed()
            while self._waiting_unconfirmed:
                taken = [
                    self._waiting_unconfirmed.popleft()
                    for _ in range(min(len(self._waiting_unconfirmed), UNCONFIRMED_AT_ONCE))
                ]
                async with asyncio.timeout(CONFIRM_TIMEOUT_S):
                    await _send_unconfirmed(await _opened(self._unconfirmed), taken)
        except (BrokerUnavailable, *_UNREACHABLE) as error:
            log.info("hints lost: %s", error or type(error).__name__, extra={"count": len(self._waiting_unconfirmed)})
            self._waiting_unconfirmed.clear()
        finally:
            # Not when the task is done: what comes between its last look and that would lie here.
            self._sending_unconfirmed = False


def _raise_if_cancelled() -> None:
    """A channel that dies cancels what waits for it; that is no cancellation of ours."""
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError


async def _as_it_is(message: Any) -> Any:
    """An asynchronous decoder that decodes nothing: a synchronous one would cost a thread hop for each message."""
    return message


def _receiver(handler: Handler) -> Callable[[Any], Awaitable[None]]:
    ledger: ChannelAcks | None = None

    async def receive(message: Any) -> None:
        nonlocal ledger
        raw: aio_pika.IncomingMessage = message.raw_message
        if ledger is None or ledger.channel is not raw.channel:
            ledger = ChannelAcks(cast("aiormq.Channel", raw.channel))
        try:
            handler(_delivery(raw, ledger))
        except Exception:
            log.exception("the handler of a queue failed; it must only hand over")

    return receive


def _delivery(raw: aio_pika.IncomingMessage, ledger: ChannelAcks) -> Delivery:
    return Delivery(
        body=raw.body,
        exchange=raw.exchange or "",
        routing_key=raw.routing_key or "",
        redelivered=bool(raw.redelivered),
        message_id=raw.message_id,
        headers=raw.headers,
        channel=ledger,
        tag=raw.delivery_tag or 0,
    )


def _acks_of(delivery: Delivery) -> ChannelAcks:
    assert isinstance(delivery.channel, ChannelAcks), "a delivery of another broker"
    return delivery.channel


def _by_channel(deliveries: Sequence[Delivery]) -> dict[ChannelAcks, list[int]]:
    tags: dict[ChannelAcks, list[int]] = {}
    for delivery in deliveries:
        ledger = _acks_of(delivery)
        if not ledger.channel.is_closed:
            tags.setdefault(ledger, []).append(delivery.tag)
    return tags


async def _opened(channel: AbstractRobustChannel) -> aiormq.Channel:
    """The channel behind a robust one, for as long as this connection lasts."""
    await channel.ready()
    return cast("aiormq.Channel", await channel.get_underlay_channel())


async def _publish(channel: aiormq.Channel, message: Outgoing, *, mandatory: bool) -> None:
    await channel.basic_publish(
        message.body,
        exchange=message.exchange,
        routing_key=message.routing_key,
        properties=_properties(message),
        mandatory=mandatory,
    )


async def _send_unconfirmed(channel: aiormq.Channel, messages: Sequence[Outgoing]) -> None:
    """All in one write: one by one, each would cost several times its share of it."""
    payload = b"".join(_on_the_wire(channel, message) for message in messages)
    async with channel.lock:
        await channel.write_queue.put(ChannelFrame(payload=payload, should_close=False))


def _on_the_wire(channel: aiormq.Channel, message: Outgoing) -> bytes:
    frames: list[Any] = [
        aiormq.spec.Basic.Publish(exchange=message.exchange, routing_key=message.routing_key),
        ContentHeader(properties=_properties(message), body_size=len(message.body)),
    ]
    for start in range(0, len(message.body), channel.max_content_size):
        frames.append(ContentBody(message.body[start : start + channel.max_content_size]))
    try:
        return ChannelFrame.marshall(channel.number, frames).payload
    except (TypeError, ValueError) as error:
        log.error("a hint to %r cannot be sent: %s", message.routing_key, error)
        return b""


def _properties(message: Outgoing) -> aiormq.spec.Basic.Properties:
    return aiormq.spec.Basic.Properties(
        content_type="application/json",
        delivery_mode=_PERSISTENT if message.persistent else _TRANSIENT,
        message_id=message.message_id,
        headers=cast("Any", dict(message.headers)) if message.headers else None,
    )


# --- topology ---------------------------------------------------------------------------------------------


async def declare_topology(url: str, shards: int) -> None:
    """Declare everything that the services need. Waits for as long as the broker is unreachable.

    Raises:
        IncompatibleFormat: another version of Sublet has set up this virtual host. Nothing was declared.
        ValueError: an exchange or a queue exists with other arguments.
    """
    virtual_host = unquote(URL(nodes_of(url)[0]).path.removeprefix("/")) or "/"

    async def declare_after_check(connection: AbstractConnection) -> None:
        await _check_format(connection, virtual_host)
        await _declare(connection, topology(shards))

    await _with_connection(url, declare_after_check)


async def declare(url: str, wanted: Topology) -> None:
    """Declare this topology. Waits for as long as the broker is unreachable.

    Raises:
        ValueError: an exchange or a queue exists with other arguments.
    """
    await _with_connection(url, partial(_declare, wanted=wanted))


async def _with_connection(url: str, use: Callable[[AbstractConnection], Awaitable[None]]) -> None:
    """Call ``use`` with a connection of its own, again after each connection error."""
    backoff = Backoff()
    nodes = cycle(nodes_of(url))
    while True:
        try:
            async with await aio_pika.connect(next(nodes), timeout=CONNECT_TIMEOUT_S) as connection:
                return await use(connection)
        except ChannelPreconditionFailed as error:
            raise ValueError(f"the broker has something else under one of our names: {error}") from error
        except (AMQPError, OSError) as error:
            delay_s = backoff.next_s()
            log.warning("no broker to declare the topology on (%s); again in %.1f s", error, delay_s)
            await asyncio.sleep(delay_s)


async def _check_format(connection: AbstractConnection, virtual_host: str) -> None:
    in_use = await _exchange_exists(connection, REQUESTS)
    marked = in_use and await _exchange_exists(connection, FORMAT_MARKER)
    check_virtual_host(virtual_host, in_use=in_use, marked=marked)


async def _exchange_exists(connection: AbstractConnection, name: str) -> bool:
    """On a channel of its own: RabbitMQ closes it if the exchange does not exist."""
    channel = await connection.channel()
    try:
        await channel.get_exchange(name, ensure=True)
    except ChannelNotFoundEntity:
        return False
    await channel.close()
    return True


async def _declare(connection: AbstractConnection, wanted: Topology) -> None:
    channel = await connection.channel()
    for exchange in wanted.exchanges:
        await channel.declare_exchange(exchange.name, type=exchange.type, durable=True)
    queues = {
        queue.name: await channel.declare_queue(queue.name, durable=True, arguments=dict(queue.arguments))
        for queue in wanted.queues
    }
    for binding in wanted.bindings:
        await queues[binding.queue].bind(binding.exchange, binding.routing_key)
