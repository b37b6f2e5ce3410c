"""The SDK's ``Transport`` in memory. It matches the protocol structurally: this package does not import the SDK."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

from sublet_platform.memory.broker import delivery_of
from sublet_platform.memory.cluster import MemoryCluster, Message, Subscription
from sublet_platform.memory.connection import MemoryConnection, Registration, Unconfirmed
from sublet_protocol.topology import POOL_ARGUMENTS, Queue


class MemoryPoolConsumer:
    def __init__(self, transport: MemoryTransport, registration: Registration) -> None:
        self._transport = transport
        self._registration = registration

    async def cancel(self) -> None:
        self._transport.cancel_pool(self._registration)


class MemoryTransport(MemoryConnection):
    """``unavailable``: the exception to raise if a publish is not confirmed within ``publish_timeout_s``."""

    def __init__(
        self,
        cluster: MemoryCluster,
        *,
        publish_timeout_s: float = 30.0,
        unavailable: type[Exception] = ConnectionError,
    ) -> None:
        super().__init__(cluster)
        self._publish_timeout_s = publish_timeout_s
        self._unavailable = unavailable

    async def connect(self) -> None:
        await self._until_connected()

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
        message = Message(body, exchange, routing_key, persistent, message_id, dict(headers or {}))
        try:
            async with asyncio.timeout(self._publish_timeout_s):
                while True:
                    await self._until_connected()
                    try:
                        return await self._send_confirmed([message])
                    except Unconfirmed:
                        # The broker refused it (perhaps its queue is missing) or is unreachable. Retry after a pause.
                        await asyncio.sleep(0.05)
        except TimeoutError as error:
            raise self._unavailable(f"not confirmed within {self._publish_timeout_s:g} s") from error

    def publish_nowait(self, exchange: str, routing_key: str, body: bytes) -> None:
        self._send([Message(body, exchange, routing_key, persistent=False, message_id=None, headers={})])

    async def open_inbox(self, name: str, on_message: Callable[[bytes], None]) -> None:
        def receive(_: Subscription, __: int, message: Message) -> None:
            on_message(message.body)

        await self._until_connected()
        self._register(Registration(Queue(name), receive, prefetch=None, inbox_key=name))

    async def consume_pool(self, queue: str, prefetch: int, on_ticket: Callable[[Any], None]) -> MemoryPoolConsumer:
        def receive(subscription: Subscription, tag: int, message: Message) -> None:
            on_ticket(delivery_of(subscription, tag, message))

        await self._until_connected()
        registration = Registration(Queue(queue, POOL_ARGUMENTS), receive, prefetch, declare=True)
        self._register(registration)
        return MemoryPoolConsumer(self, registration)

    def _channel_closed(self, registration: Registration) -> None:
        """Close the connection, because the SDK discards the whole connection with a closed channel."""
        self.kill_connection()

    def cancel_pool(self, registration: Registration) -> None:
        self._cancel(registration)

    def ack(self, ticket: Any) -> None:
        if ticket.channel.open:
            self._settle(ticket.channel, [ticket.tag])

    def requeue(self, ticket: Any) -> None:
        if ticket.channel.open:
            self._requeue(ticket.channel, [ticket.tag])

    def on_reconnect(self, callback: Callable[[], None]) -> None:
        self._reconnected.append(callback)
