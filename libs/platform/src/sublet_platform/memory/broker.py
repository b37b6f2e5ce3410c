"""The `Broker` port in memory."""

from __future__ import annotations

from collections.abc import Sequence

from sublet_platform.memory.cluster import MemoryCluster, Message, Receive, Subscription
from sublet_platform.memory.connection import MemoryConnection, Registration, Unconfirmed
from sublet_platform.ports import BrokerUnavailable, Delivery, Handler, Outgoing
from sublet_protocol.topology import Queue


class MemoryConsumer:
    """See `ports.Consumer`."""

    def __init__(self, broker: MemoryBroker, registration: Registration) -> None:
        self._broker = broker
        self._registration = registration

    async def close(self) -> None:
        await self._broker.close_consumer(self._registration)


class MemoryBroker(MemoryConnection):
    """See `ports.Broker`. One client of the cluster; `kill_connection` closes its connection abruptly."""

    def __init__(self, cluster: MemoryCluster) -> None:
        super().__init__(cluster)

    async def consume(self, queue: str, handler: Handler, *, prefetch: int) -> MemoryConsumer:
        return self._consume(Registration(Queue(queue), _receiver(handler), prefetch))

    async def open_inbox(self, name: str, handler: Handler, *, key: str | None = None) -> MemoryConsumer:
        return self._consume(Registration(Queue(name), _receiver(handler), prefetch=None, inbox_key=key or name))

    def _consume(self, registration: Registration) -> MemoryConsumer:
        if not self.connected:
            raise BrokerUnavailable("not connected")
        try:
            self._register(registration)
        except KeyError as error:
            raise BrokerUnavailable(f"there is no queue {registration.queue.name!r}") from error
        return MemoryConsumer(self, registration)

    async def close_consumer(self, registration: Registration) -> None:
        await self._close(registration)

    def ack(self, deliveries: Sequence[Delivery]) -> None:
        for subscription, tags in self._by_channel(deliveries).items():
            self._settle(subscription, tags)

    def requeue(self, deliveries: Sequence[Delivery]) -> None:
        for subscription, tags in self._by_channel(deliveries).items():
            self._requeue(subscription, tags)

    def is_void(self, delivery: Delivery) -> bool:
        return not _subscription_of(delivery).open

    def _by_channel(self, deliveries: Sequence[Delivery]) -> dict[Subscription, list[int]]:
        tags: dict[Subscription, list[int]] = {}
        for delivery in deliveries:
            if not self.is_void(delivery):  # the cluster ignores deliveries that need no acknowledgement
                tags.setdefault(_subscription_of(delivery), []).append(delivery.tag)
        return tags

    async def publish(self, messages: Sequence[Outgoing]) -> None:
        if not messages:
            return
        try:
            await self._send_confirmed([_message(each) for each in messages])
        except Unconfirmed as error:
            raise BrokerUnavailable(str(error)) from error

    def publish_nowait(self, messages: Sequence[Outgoing]) -> None:
        self._send([_message(each) for each in messages])


def _receiver(handler: Handler) -> Receive:
    def receive(subscription: Subscription, tag: int, message: Message) -> None:
        handler(delivery_of(subscription, tag, message))

    return receive


def delivery_of(subscription: Subscription, tag: int, message: Message) -> Delivery:
    return Delivery(
        body=message.body,
        exchange=message.exchange,
        routing_key=message.routing_key,
        redelivered=message.redelivered,
        message_id=message.message_id,
        headers=message.headers,
        channel=subscription,
        tag=tag,
        needs_ack=subscription.needs_ack,
    )


def _subscription_of(delivery: Delivery) -> Subscription:
    assert isinstance(delivery.channel, Subscription), "a delivery of another broker"
    return delivery.channel


def _message(outgoing: Outgoing) -> Message:
    return Message(
        body=outgoing.body,
        exchange=outgoing.exchange,
        routing_key=outgoing.routing_key,
        persistent=outgoing.persistent,
        message_id=outgoing.message_id,
        headers=dict(outgoing.headers),
    )
