"""The transport on RabbitMQ, with aio-pika. No other module of the SDK imports aio-pika.

A `_Session` is one connection with its channels. When the connection or the channel of a consumer breaks, the whole
session is discarded, and the transport opens another one: first the inbox, then the pools, then the callbacks of
`on_reconnect`. So no channel is used again, and the channel of a ticket tells whether the ticket is void.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Hashable, Mapping
from functools import partial
from itertools import cycle
from typing import Any, cast

import aio_pika
from aio_pika.exceptions import (
    AMQPError,
    AuthenticationError,
    ChannelNotFoundEntity,
    DeliveryError,
    ProbableAuthenticationError,
    PublishError,
)

from sublet._amqp.connection_scope import ConnectionScope
from sublet._amqp.transport import PREFETCH_MAX, TicketDelivery
from sublet._errors import TransportUnavailable
from sublet_protocol import limits
from sublet_protocol.addresses import CONNECT_TIMEOUT_S, addresses, with_heartbeat
from sublet_protocol.backoff import Backoff
from sublet_protocol.topology import INBOXES, POOL_ARGUMENTS

CONNECT_PAUSE_S = 0.1
"""Seconds before the second attempt to connect. Pauses double up to `CONNECT_PAUSE_MAX_S`."""
CONNECT_PAUSE_MAX_S = 5.0
"""So many clients do not overload a RabbitMQ that is starting, and still connect soon after it is ready."""
REPUBLISH_PAUSE_S = 0.05
"""Seconds before a message is published again. Pauses double up to `REPUBLISH_PAUSE_MAX_S`."""
REPUBLISH_PAUSE_MAX_S = 1.0
"""A caller waits for the confirm, so this is shorter than the pause between attempts to connect."""
CLOSE_SEND_MAX_S = 1.0
"""Seconds that `close` waits until pending acknowledgements are sent. RabbitMQ delivers the other tickets again."""
RESTORE_PAUSE_S = 1.0
"""Seconds before a session whose consumers could not be restored is replaced, so that the log is not flooded."""
TOPOLOGY_CHECK_INTERVAL_S = 0.5
"""Seconds between checks for an exchange that is not declared yet, or for an inbox that is still locked."""
CHECKS_PER_WARNING = 20
"""Only one of so many checks logs a warning (one in 10 s)."""

_BROKEN = (AMQPError, OSError, RuntimeError)
"""Exceptions of aio-pika when a connection or channel is closed (its ChannelInvalidStateError is a RuntimeError)."""

_REFUSED = (AuthenticationError, ProbableAuthenticationError)

logger = logging.getLogger(__name__)

Consume = Callable[["_Session"], Awaitable[None]]
PendingSend = Callable[[], Coroutine[Any, Any, Any]]


class _Session:
    """One connection, its channels, and its consumers."""

    def __init__(self, connection: aio_pika.abc.AbstractConnection) -> None:
        self.connection = connection
        self.closed = asyncio.Event()
        self.scope = ConnectionScope()
        """Guards all code that uses this session."""
        self.unacked: dict[Hashable, set[int]] = {}
        """Delivery tags of tickets that are not acknowledged, by channel."""
        self._consuming: set[str] = set()
        self._consumers_lock = asyncio.Lock()
        self._channels_lock = asyncio.Lock()
        self._exchanges = {""}
        self._confirmed: aio_pika.abc.AbstractChannel | None = None
        self._unconfirmed: aio_pika.abc.AbstractChannel | None = None
        self._unconfirmed_until = 0.0
        self._closing: asyncio.Task[None] | None = None
        connection.close_callbacks.add(self._on_closed)

    async def publish(self, exchange: str, routing_key: str, body: bytes, properties: Any) -> None:
        if exchange not in self._exchanges:
            await self._check_exchange(exchange)
        if self._confirmed is None or self._confirmed.is_closed:
            async with self._channels_lock:
                if self._confirmed is None or self._confirmed.is_closed:
                    self._confirmed = await _opened(self.connection.channel(on_return_raises=True))
        channel = await self._confirmed.get_underlay_channel()
        try:
            await channel.basic_publish(
                body, exchange=exchange, routing_key=routing_key, properties=properties, mandatory=True
            )
        except PublishError:
            raise
        except DeliveryError:
            # A channel that used a quorum queue without a leader is refused until it is closed (RabbitMQ 3.10).
            await channel.close(AMQPError("RabbitMQ refused a message on this channel"))
            raise

    async def publish_nowait(self, exchange: str, routing_key: str, body: bytes) -> None:
        if exchange not in self._exchanges:
            await self._check_exchange(exchange)
        old, now = self._unconfirmed, asyncio.get_running_loop().time()
        if self._unconfirmed is None or self._unconfirmed.is_closed or now > self._unconfirmed_until:
            self._unconfirmed = await self.plain_channel()
            self._unconfirmed_until = now + limits.UNCONFIRMED_CHANNEL_S
            if old is not None:
                await old.close()
        channel: Any = await self._unconfirmed.get_underlay_channel()
        properties = aio_pika.Message(b"", content_type="application/json").properties
        await channel.basic_publish(body, exchange=exchange, routing_key=routing_key, properties=properties, wait=False)

    async def consume(self, name: str, start: Consume) -> None:
        """Start this consumer unless it is started. Consumers are started one by one, in the order of the calls."""
        async with self._consumers_lock:
            if name not in self._consuming:
                await start(self)
                self._consuming.add(name)

    async def plain_channel(self) -> aio_pika.abc.AbstractChannel:
        return await _opened(self.connection.channel(publisher_confirms=False))

    async def watch(self, channel: aio_pika.abc.AbstractChannel) -> None:
        """Discard the session when this channel or its consumer ends."""
        channel.close_callbacks.add(self._on_closed)
        underlay: Any = await channel.get_underlay_channel()
        underlay.on_consumer_cancel_callbacks.add(self._on_cancelled)
        if channel.is_closed:
            self.abort()

    def abort(self) -> None:
        """Discard the session."""
        self.closed.set()
        self.scope.close()
        if self._closing is None:
            self._closing = asyncio.create_task(self._close())

    async def close(self) -> None:
        self.abort()
        assert self._closing is not None  # by abort
        await self._closing

    async def _close(self) -> None:
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                await self.connection.close()
        except _BROKEN:
            logger.debug("the connection was closed already", exc_info=True)

    def _on_closed(self, *_: object) -> None:
        self.abort()

    def _on_cancelled(self, *_: object) -> None:
        logger.warning("RabbitMQ cancelled a consumer, reconnecting")
        self.abort()

    async def _check_exchange(self, exchange: str) -> None:
        # On a separate channel, because RabbitMQ closes the channel if the exchange does not exist.
        async with self._channels_lock:
            if exchange in self._exchanges:
                return
            channel = await self.plain_channel()
            await channel.declare_exchange(exchange, passive=True)
            await channel.close()
            self._exchanges.add(exchange)


class AmqpTransport:
    """`Transport` on RabbitMQ; see there for the methods. Use it only on the event loop that connects it."""

    def __init__(self, url: str, *, publish_timeout_s: float = 60.0, name: str = "sublet") -> None:
        """``url`` may list several nodes, separated by commas, to try in turn. ``name`` is shown by RabbitMQ."""
        self._urls = cycle(addresses(url))
        self._url = next(self._urls)
        """The node that is connected or that is tried next."""
        self._publish_timeout_s = publish_timeout_s
        self._name = name
        self._session: _Session | None = None
        self._changed = asyncio.Event()
        """Set while there is a session, and when the transport is closed."""
        self._closed = False
        self._consumers: dict[str, Consume] = {}
        self._reconnect_callbacks: list[Callable[[], None]] = []
        self._pending_sends: deque[tuple[_Session, PendingSend]] = deque()
        self._send_added = asyncio.Event()
        self._sends_done = asyncio.Event()
        self._sends_done.set()
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def connected(self) -> bool:
        return self._session is not None

    async def connect(self) -> None:
        """
        Raises:
            TransportUnavailable: RabbitMQ refuses the user, the password or the virtual host.
        """
        try:
            session = await self._open_session(fatal=_REFUSED)
        except _REFUSED as error:
            raise TransportUnavailable(
                f"RabbitMQ at {self._shown_url()} refuses this user or password: {error}"
            ) from error
        self._use(session)
        self._tasks = [
            asyncio.create_task(self._keep_connected(session)),
            asyncio.create_task(self._send_loop()),
        ]

    async def close(self) -> None:
        """Send pending acknowledgements, then close the connection."""
        if self._session is not None and self._pending_sends:
            try:
                async with asyncio.timeout(CLOSE_SEND_MAX_S):
                    await self._sends_done.wait()
            except TimeoutError:
                logger.warning(
                    "closed with %d unsent acknowledgements: RabbitMQ delivers their tickets again",
                    len(self._pending_sends),
                )
        self._closed = True
        session, self._session = self._session, None
        self._changed.set()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if session is not None:
            await session.close()

    # --- publishing -----------------------------------------------------------------------------------------------

    async def publish(
        self,
        exchange: str,
        routing_key: str,
        body: bytes,
        *,
        persistent: bool = True,
        message_id: str | None = None,
        headers: Mapping[str, object] | None = None,
    ) -> None:
        """Confirmed means: stored in a queue. A message that no queue accepts yet is published again, like one whose
        connection broke. The text of TransportUnavailable says what the problem was."""
        message = aio_pika.Message(
            b"",
            content_type="application/json",
            delivery_mode=aio_pika.DeliveryMode.PERSISTENT if persistent else aio_pika.DeliveryMode.NOT_PERSISTENT,
            message_id=message_id,
            headers=cast("Any", headers),
        )
        properties = message.properties
        problem = "not connected"
        backoff = Backoff(REPUBLISH_PAUSE_S, REPUBLISH_PAUSE_MAX_S)
        try:
            async with asyncio.timeout(self._publish_timeout_s):
                while True:
                    session = await self._usable_session()
                    try:
                        with session.scope.held():
                            await session.publish(exchange, routing_key, body, properties)
                        return
                    except _BROKEN as error:
                        problem = _problem(error, exchange, routing_key)
                    logger.info("publishing again: %s", problem)
                    await asyncio.sleep(backoff.next_s())
        except TimeoutError:
            raise TransportUnavailable(
                f"RabbitMQ at {self._shown_url()} did not confirm within {self._publish_timeout_s:g} s: {problem}."
                " The message may or may not have arrived."
            ) from None

    def publish_nowait(self, exchange: str, routing_key: str, body: bytes) -> None:
        session = self._session
        if session is not None:
            self._send_soon(session, partial(session.publish_nowait, exchange, routing_key, body))

    # --- consuming ------------------------------------------------------------------------------------------------

    async def open_inbox(self, name: str, on_message: Callable[[bytes], None]) -> None:
        await self._consume(name, partial(_start_inbox, name, on_message))

    async def consume_pool(
        self, queue: str, prefetch: int, on_ticket: Callable[[TicketDelivery], None]
    ) -> _PoolConsumer:
        if not 1 <= prefetch <= PREFETCH_MAX:
            raise ValueError(f"a worker has 1 to {PREFETCH_MAX:,} slots of a kind, not {prefetch:,}")
        consumer = _PoolConsumer(self._consumers, queue, prefetch, on_ticket)
        await self._consume(queue, consumer.start)
        return consumer

    def ack(self, ticket: TicketDelivery) -> None:
        self._settle(ticket, "basic_ack")

    def requeue(self, ticket: TicketDelivery) -> None:
        self._settle(ticket, "basic_nack", requeue=True)

    def on_reconnect(self, callback: Callable[[], None]) -> None:
        self._reconnect_callbacks.append(callback)

    # --- inside ---------------------------------------------------------------------------------------------------

    def _settle(self, ticket: TicketDelivery, method: str, **options: Any) -> None:
        """Acknowledge or requeue, unless the ticket is void or settled: an unknown tag would close the channel."""
        session = self._session
        tags = session.unacked.get(ticket.channel) if session is not None else None
        if session is not None and tags is not None and ticket.tag in tags:
            tags.remove(ticket.tag)
            self._send_soon(session, partial(getattr(ticket.channel, method), ticket.tag, wait=False, **options))

    async def _consume(self, name: str, start: Consume) -> None:
        self._consumers[name] = start
        while name in self._consumers:
            session = await self._usable_session()
            try:
                with session.scope.held():
                    await session.consume(name, start)
                return
            except _BROKEN as error:
                if not session.closed.is_set():
                    del self._consumers[name]
                    raise TransportUnavailable(f"RabbitMQ refuses to consume {name!r}: {error}") from error
            await asyncio.sleep(REPUBLISH_PAUSE_S)

    def _use(self, session: _Session) -> None:
        self._session = session
        self._changed.set()

    async def _usable_session(self) -> _Session:
        while self._session is None:
            if self._closed:
                raise TransportUnavailable("the connection to RabbitMQ was closed by this program")
            await self._changed.wait()
        return self._session

    async def _open_session(self, fatal: tuple[type[Exception], ...] = ()) -> _Session:
        backoff = Backoff(CONNECT_PAUSE_S, CONNECT_PAUSE_MAX_S)
        while True:
            url = with_heartbeat(self._url)
            try:
                with ConnectionScope().held():
                    return _Session(await aio_pika.connect(url, timeout=CONNECT_TIMEOUT_S, name=self._name))
            except fatal:
                raise
            except _BROKEN as error:
                logger.warning("cannot connect to RabbitMQ at %s, trying again: %s", self._shown_url(), error)
            self._url = next(self._urls)
            await asyncio.sleep(backoff.next_s())

    async def _keep_connected(self, session: _Session) -> None:
        while True:
            await session.closed.wait()
            self._session = None
            self._changed.clear()
            logger.warning("lost the connection to RabbitMQ at %s, reconnecting", self._shown_url())
            self._url = next(self._urls)
            session = await self._open_session()
            self._use(session)
            try:
                with session.scope.held():
                    for name, start in list(self._consumers.items()):
                        await session.consume(name, start)
            except _BROKEN as error:
                logger.warning("cannot restore the consumers, reconnecting: %s", error)
                await asyncio.sleep(RESTORE_PAUSE_S)
                session.abort()
            else:
                logger.info("reconnected to RabbitMQ")
                for callback in self._reconnect_callbacks:
                    self._call(callback)

    def _call(self, callback: Callable[[], None]) -> None:
        try:
            callback()
        except Exception:
            logger.exception("a callback failed after the reconnect")

    def _send_soon(self, session: _Session, pending_send: PendingSend) -> None:
        self._pending_sends.append((session, pending_send))
        self._send_added.set()
        self._sends_done.clear()

    async def _send_loop(self) -> None:
        """Send acknowledgements and unconfirmed messages one by one, in the order of the calls."""
        while True:
            await self._send_added.wait()
            self._send_added.clear()
            while self._pending_sends:
                session, pending_send = self._pending_sends.popleft()
                try:
                    with session.scope.held():
                        await pending_send()
                except _BROKEN as error:
                    logger.debug("an acknowledgement or unconfirmed message was lost with its connection: %s", error)
            self._sends_done.set()

    def _shown_url(self) -> str:
        scheme, _, rest = self._url.partition("://")
        return f"{scheme}://{rest.rpartition('@')[2].partition('?')[0]}"


class _PoolConsumer:
    """`PoolConsumer` on RabbitMQ. It restarts itself in each new session until it is cancelled."""

    def __init__(
        self,
        restored: dict[str, Consume],
        queue: str,
        prefetch: int,
        on_ticket: Callable[[TicketDelivery], None],
    ) -> None:
        self._restored = restored
        self._queue = queue
        self._prefetch = prefetch
        self._on_ticket = on_ticket
        self._consuming: tuple[_Session, Any, str] | None = None

    async def start(self, session: _Session) -> None:
        channel = await session.plain_channel()
        await channel.set_qos(prefetch_count=self._prefetch)
        await channel.declare_queue(
            self._queue,
            durable=True,
            # No queue type: the default of the virtual host applies. In a cluster it should be quorum, so that a queue
            # outlives its node.
            arguments=dict(POOL_ARGUMENTS),
        )
        underlay: Any = await channel.get_underlay_channel()
        unacked = session.unacked[underlay] = set()
        await session.watch(channel)

        def deliver(message: Any) -> None:
            unacked.add(message.delivery.delivery_tag)
            self._on_ticket(
                TicketDelivery(
                    body=message.body,
                    redelivered=message.delivery.redelivered,
                    channel=underlay,
                    tag=message.delivery.delivery_tag,
                )
            )

        consumed = await underlay.basic_consume(self._queue, deliver)
        self._consuming = session, underlay, consumed.consumer_tag

    async def cancel(self) -> None:
        """Stop the delivery of tickets. Delivered ones can still be acknowledged."""
        self._restored.pop(self._queue, None)
        if self._consuming is None:
            return
        session, channel, tag = self._consuming
        self._consuming = None
        try:
            with session.scope.held():
                await channel.basic_cancel(tag)
        except _BROKEN:
            logger.debug("the consumer was cancelled already", exc_info=True)


async def _start_inbox(name: str, on_message: Callable[[bytes], None], session: _Session) -> None:
    checks = 0
    while True:
        channel = await session.plain_channel()
        try:
            queue = await channel.declare_queue(name, exclusive=True, auto_delete=True)
            await queue.bind(INBOXES, routing_key=name)
            break
        except AMQPError as error:
            if session.closed.is_set():
                raise
            if checks % CHECKS_PER_WARNING == 0:
                logger.warning("%s", _waiting_for(error, name))
        checks += 1
        await asyncio.sleep(TOPOLOGY_CHECK_INTERVAL_S)
    await session.watch(channel)
    underlay: Any = await channel.get_underlay_channel()
    await underlay.basic_consume(name, lambda message: on_message(message.body), no_ack=True)


def _waiting_for(error: AMQPError, inbox: str) -> str:
    if isinstance(error, ChannelNotFoundEntity):
        return f"waiting for exchange {INBOXES}: is a scheduler running?"
    return f"waiting for inbox {inbox}, which the broken connection may still hold: {error}"


def _problem(error: BaseException, exchange: str, routing_key: str) -> str:
    """Why a message was not confirmed, and what to do about it."""
    if isinstance(error, ChannelNotFoundEntity):
        return f"there is no exchange {exchange}: is a scheduler running?"
    if isinstance(error, PublishError):
        return f"no queue takes {routing_key!r} from exchange {exchange}: are the services running?"
    if isinstance(error, DeliveryError):
        return f"RabbitMQ refused a message to exchange {exchange} with key {routing_key!r}"
    return f"the connection failed ({type(error).__name__}: {error})"


async def _opened(channel: Any) -> aio_pika.abc.AbstractChannel:
    return await channel  # type: ignore[no-any-return]  # awaiting a channel opens it
