"""What the SDK needs of AMQP. `AmqpTransport` implements it with aio-pika; tests and the simulator do it in memory."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Protocol

PREFETCH_MAX = 65_535
"""The most slots of a kind on one worker: AMQP writes the prefetch count of a consumer in 16 bits."""


@dataclass(frozen=True, slots=True, eq=False)
class TicketDelivery:
    """A delivered ticket. RabbitMQ counts a slot of this worker as taken until the ticket is acknowledged."""

    body: bytes
    redelivered: bool
    channel: Hashable
    """The channel that delivered the ticket. When it closes, the ticket is void and RabbitMQ delivers it again."""
    tag: int


class PoolConsumer(Protocol):
    async def cancel(self) -> None:
        """Stop the delivery of tickets. Delivered ones can still be acknowledged."""


class Transport(Protocol):
    async def connect(self) -> None:
        """Returns when connected. Retries with growing pauses while RabbitMQ is not reachable."""

    async def close(self) -> None: ...

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
        """Publish a message. Returns when RabbitMQ has confirmed it.

        When the connection breaks, waits for a reconnect and publishes again; receivers are idempotent.

        Raises:
            TransportUnavailable: RabbitMQ did not confirm within the ``publish_timeout_s`` of the transport.
        """

    def publish_nowait(self, exchange: str, routing_key: str, body: bytes) -> None:
        """Publish a transient message without a confirm. It is lost if the connection is down."""

    async def open_inbox(self, name: str, on_message: Callable[[bytes], None]) -> None:
        """Declare an exclusive transient queue that is bound to ``sublet.inboxes`` under its name, and consume it.

        Messages are not acknowledged. The inbox is opened again after a reconnect; messages sent meanwhile are lost.
        """

    async def consume_pool(
        self, queue: str, prefetch: int, on_ticket: Callable[[TicketDelivery], None]
    ) -> PoolConsumer:
        """Declare the queue of a pool, and consume it with at most ``prefetch`` unacknowledged tickets."""

    def ack(self, ticket: TicketDelivery) -> None:
        """Acknowledge a ticket. Ignored if its channel is closed."""

    def requeue(self, ticket: TicketDelivery) -> None:
        """Requeue a ticket, for any worker. Ignored if its channel is closed."""

    def on_reconnect(self, callback: Callable[[], None]) -> None:
        """Call ``callback`` after every reconnect, when inbox and pool consumers are restored."""

    @property
    def connected(self) -> bool: ...
