"""RabbitMQ: the `Broker` port over FastStream and aio-pika, and the declaration of the topology.

Consuming goes through FastStream subscribers without dependency injection, decoding or automatic acknowledgement,
each on a channel of its own, so that its prefetch applies. Publishing uses two channels directly: one with pipelined
confirms, and one without confirms.
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

logger = logging.getLogger(__name__)

RECONNECT_INTERVAL_S = 1.0
CONFIRM_TIMEOUT_S = 10.0
"""A majority of a healthy cluster confirms within milliseconds; a blocked broker (no disk, no memory) never does."""
UNCONFIRMED_AT_ONCE = 100
"""Messages in one write."""
REQUEST_TIMEOUT_S = 10.0
"""Time to start or stop a consumer."""

_UNREACHABLE = (AMQPError, OSError, RuntimeError, asyncio.InvalidStateError, asyncio.CancelledError)
"""Raised by a publish whose connection or channel is lost. aiormq cancels its own tasks: hence the CancelledError."""
_TRANSIENT, _PERSISTENT = 1, 2

Receive = Callable[[Any], Awaitable[None]]
"""Receives a message of FastStream."""


class _DistinctQueue(RabbitQueue):
    """A queue that equals no other instance. FastStream caches declared queues by name, with their channel, so a second
    consumer of a queue would share the channel of the first one, or get its closed channel."""

    def __hash__(self) -> int:
        return id(self)

    def __eq__(self, other: object) -> bool:
        return self is other


class ChannelAcks:
    """One AMQP channel with its acknowledgements. It is the `Delivery.channel` of its deliveries."""

    def __init__(self, channel: aiormq.Channel) -> None:
        self.channel = channel
        self.ack_tracker = AckTracker()
        self._frames: deque[tuple[int, bool, bool]] = deque()
        self._sending = False

    def settle(self, tags: list[int], *, ack: bool) -> bool:
        """Queue the frames to send. True if :meth:`send` must be started."""
        self._frames.extend((tag, multiple, ack) for tag, multiple in self.ack_tracker.settle(tags))
        start = bool(self._frames) and not self._sending
        self._sending = self._sending or start
        return start

    async def send(self) -> None:
        """Send the frames in order, by one sender. A tag after a frame that covers it would close the channel."""
        try:
            while self._frames:
                tag, multiple, ack = self._frames.popleft()
                # The write queue of a dead socket may stay full.
                async with asyncio.timeout(REQUEST_TIMEOUT_S):
                    if ack:
                        await self.channel.basic_ack(tag, multiple=multiple, wait=False)
                    else:
                        await self.channel.basic_nack(tag, multiple=multiple, requeue=True, wait=False)
        except _UNREACHABLE as error:
            self._frames.clear()
            logger.debug("acknowledgements lost, the messages will be redelivered: %r", error)
            await self._close(error)
        finally:
            self._sending = False

    async def _close(self, error: BaseException) -> None:
        """Close the channel, so that RabbitMQ requeues its unsettled messages."""
        with contextlib.suppress(*_UNREACHABLE):
            await self.channel.close(AMQPError(f"not settled: {error!r}"), timeout=REQUEST_TIMEOUT_S)


class RabbitConsumer:
    """See `ports.Consumer`."""

    def __init__(self, rabbit: Rabbit, subscriber: RabbitSubscriber, channel: Channel) -> None:
        self._rabbit = rabbit
        self._subscriber = subscriber
        self._channel = channel

    async def close(self) -> None:
        # The consumer is not cancelled first. Otherwise the next consumer of a single-active-consumer queue would be
        # served before the deliveries of this one have been requeued at their positions.
        self._subscriber.running = False
        await self._rabbit.close_channel(self._channel)
        await self._rabbit.stop_subscriber(self._subscriber)


class Rabbit:
    """See `ports.Broker`. ``url`` may name several nodes of a cluster, separated by commas; they are tried in
    turn. ``faststream`` is the broker for a FastStream app. ``on_published(seconds)`` receives the duration of each
    call of `publish`."""

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
        # FastStream has no setting for several nodes. It passes these arguments on to aio-pika.
        self.faststream._connection_kwargs["connection_class"] = partial(NodeConnection, urls=urls)
        self._connection: AbstractRobustConnection | None = None
        self._confirmed: AbstractRobustChannel | None = None
        self._unconfirmed: AbstractRobustChannel | None = None
        self._unconfirmed_until = 0.0
        self._pending_unconfirmed: deque[Outgoing] = deque()
        self._tasks: set[asyncio.Task[None]] = set()
        self._opened: dict[Channel, AbstractRobustChannel] = {}
        self._closing_later: set[asyncio.Task[None]] = set()
        self._sending_unconfirmed = False

    async def open(self) -> None:
        """Connect and open the channels for publishing, once. Waits as long as the broker is unavailable."""
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
            decoder=_undecoded,
            no_reply=True,
            persistent=False,
            title=queue,
        )
        return await self._start(subscriber, channel, _receiver(handler, needs_ack=True))

    async def open_inbox(self, name: str, handler: Handler, *, key: str | None = None) -> RabbitConsumer:
        channel = Channel()
        subscriber = self.faststream.subscriber(
            _DistinctQueue(name, durable=False, exclusive=True, auto_delete=True, routing_key=key or name),
            RabbitExchange(INBOXES, type=ExchangeType.DIRECT, durable=True, declare=False),
            channel=channel,
            ack_policy=AckPolicy.ACK_FIRST,
            decoder=_undecoded,
            no_reply=True,
            persistent=False,
            include_in_schema=False,
        )
        return await self._start(subscriber, channel, _receiver(handler, needs_ack=False))

    async def _start(self, subscriber: RabbitSubscriber, channel: Channel, receive: Receive) -> RabbitConsumer:
        subscriber(receive)
        # FastStream drops deliveries that arrive before its own start has returned.
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
        """Stop deliveries."""
        try:
            await self._request(subscriber.stop())
        except BrokerUnavailable as error:
            logger.debug("consumer not cancelled: %s", error)

    async def close_channel(self, channel: Channel) -> None:
        """Close a channel. Its unacknowledged messages are requeued."""
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
        """Close it also without a connection, so that the next connection does not restore the channel."""
        connected = self.connected
        try:
            async with asyncio.timeout(REQUEST_TIMEOUT_S):
                await opened.close()
        except _UNREACHABLE as error:
            _raise_if_cancelled()
            logger.debug("channel not closed: %r", error)
            return False
        return connected

    async def _close_later(self, opened: AbstractRobustChannel) -> None:
        """Retry until the channel is closed, because it may have been restored meanwhile. Nothing handles its
        deliveries any more, and on a queue with a single active consumer all others would wait behind it."""
        while not await self._closed(opened):  # noqa: ASYNC110  # there is no event to await
            await asyncio.sleep(RECONNECT_INTERVAL_S)

    def ack(self, deliveries: Sequence[Delivery]) -> None:
        for acks, tags in _by_channel(deliveries).items():
            if acks.settle(tags, ack=True):
                self._soon(acks.send())

    def requeue(self, deliveries: Sequence[Delivery]) -> None:
        for acks, tags in _by_channel(deliveries).items():
            if acks.settle(tags, ack=False):
                self._soon(acks.send())

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
                # Tasks start in this order, so the messages are sent in it. The confirms are awaited together.
                outcomes = await asyncio.gather(
                    *(_publish(channel, message, mandatory=message.exchange in MUST_ARRIVE) for message in messages),
                    return_exceptions=True,
                )
                if any(type(outcome) is DeliveryError for outcome in outcomes):
                    # It would refuse the next ones too (see limits.UNCONFIRMED_CHANNEL_S). The robust channel reopens.
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
        self._pending_unconfirmed.extend(messages)
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
            while self._pending_unconfirmed:
                taken = [
                    self._pending_unconfirmed.popleft()
                    for _ in range(min(len(self._pending_unconfirmed), UNCONFIRMED_AT_ONCE))
                ]
                async with asyncio.timeout(CONFIRM_TIMEOUT_S):
                    await _send_unconfirmed(await _opened(self._unconfirmed), taken)
        except (BrokerUnavailable, *_UNREACHABLE) as error:
            logger.info(
                "unconfirmed messages dropped: %s",
                error or type(error).__name__,
                extra={"count": len(self._pending_unconfirmed)},
            )
            self._pending_unconfirmed.clear()
        finally:
            # Not in a done callback: a message that arrives before the callback would not be sent.
            self._sending_unconfirmed = False


def _raise_if_cancelled() -> None:
    """Raise only if this task was cancelled. A closing channel also cancels the calls that wait for it."""
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError


async def _undecoded(message: Any) -> Any:
    """Return the message undecoded. A synchronous decoder would run in a thread for each message."""
    return message


def _receiver(handler: Handler, *, needs_ack: bool) -> Receive:
    acks: ChannelAcks | None = None

    async def receive(message: Any) -> None:
        nonlocal acks
        raw: aio_pika.IncomingMessage = message.raw_message
        if acks is None or acks.channel is not raw.channel:
            acks = ChannelAcks(cast("aiormq.Channel", raw.channel))
        try:
            handler(_delivery(raw, acks, needs_ack))
        except Exception:
            logger.exception("the handler of a queue failed; handlers must only pass deliveries on")

    return receive


def _delivery(raw: aio_pika.IncomingMessage, acks: ChannelAcks, needs_ack: bool) -> Delivery:
    return Delivery(
        body=raw.body,
        exchange=raw.exchange or "",
        routing_key=raw.routing_key or "",
        redelivered=bool(raw.redelivered),
        message_id=raw.message_id,
        headers=raw.headers,
        channel=acks,
        tag=raw.delivery_tag or 0,
        needs_ack=needs_ack,
    )


def _acks_of(delivery: Delivery) -> ChannelAcks:
    assert isinstance(delivery.channel, ChannelAcks), "a delivery of another broker"
    return delivery.channel


def _by_channel(deliveries: Sequence[Delivery]) -> dict[ChannelAcks, list[int]]:
    """The tags to settle. RabbitMQ closes a channel on which a delivery is settled that needs no acknowledgement."""
    tags: dict[ChannelAcks, list[int]] = {}
    for delivery in deliveries:
        acks = _acks_of(delivery)
        if delivery.needs_ack and not acks.channel.is_closed:
            tags.setdefault(acks, []).append(delivery.tag)
    return tags


async def _opened(channel: AbstractRobustChannel) -> aiormq.Channel:
    """The underlying channel of a robust one. It is valid until the connection is lost."""
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
    """Send all messages in one write, which is several times cheaper than one write each."""
    payload = b"".join(_encoded(channel, message) for message in messages)
    async with channel.lock:
        await channel.write_queue.put(ChannelFrame(payload=payload, should_close=False))


def _encoded(channel: aiormq.Channel, message: Outgoing) -> bytes:
    frames: list[Any] = [
        aiormq.spec.Basic.Publish(exchange=message.exchange, routing_key=message.routing_key),
        ContentHeader(properties=_properties(message), body_size=len(message.body)),
    ]
    for start in range(0, len(message.body), channel.max_content_size):
        frames.append(ContentBody(message.body[start : start + channel.max_content_size]))
    try:
        return ChannelFrame.marshall(channel.number, frames).payload
    except (TypeError, ValueError) as error:
        logger.error("an unconfirmed message to %r cannot be encoded: %s", message.routing_key, error)
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
    """Declare everything that the services need. Waits as long as the broker is unreachable.

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
    """Declare this topology. Waits as long as the broker is unreachable.

    Raises:
        ValueError: an exchange or a queue exists with other arguments.
    """
    await _with_connection(url, partial(_declare, wanted=wanted))


async def _with_connection(url: str, use: Callable[[AbstractConnection], Awaitable[None]]) -> None:
    """Call ``use`` with a new connection, and retry after each connection error."""
    backoff = Backoff()
    nodes = cycle(nodes_of(url))
    while True:
        try:
            async with await aio_pika.connect(next(nodes), timeout=CONNECT_TIMEOUT_S) as connection:
                return await use(connection)
        except ChannelPreconditionFailed as error:
            raise ValueError(f"an exchange or queue exists with other arguments: {error}") from error
        except (AMQPError, OSError) as error:
            delay_s = backoff.next_s()
            logger.warning("cannot declare the topology (%s); retrying in %.1f s", error, delay_s)
            await asyncio.sleep(delay_s)


async def _check_format(connection: AbstractConnection, virtual_host: str) -> None:
    in_use = await _exchange_exists(connection, REQUESTS)
    marked = in_use and await _exchange_exists(connection, FORMAT_MARKER)
    check_virtual_host(virtual_host, in_use=in_use, marked=marked)


async def _exchange_exists(connection: AbstractConnection, name: str) -> bool:
    """Check on a separate channel, because RabbitMQ closes it if the exchange does not exist."""
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
