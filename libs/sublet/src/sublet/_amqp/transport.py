"""What the SDK needs of AMQP. `sublet.amqp` implements it with aio-pika; tests and the simulator do it in memory."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True, eq=False)
class TicketDelivery:
    """A ticket that was delivered: a slot of this worker is taken until it is acknowledged."""

    body: bytes
    redelivered: bool
    channel: Hashable
    """The channel it came on; void once that channel has closed, and then delivered again to somebody."""
    tag: int


class PoolConsumer(Protocol):
    async def cancel(self) -> None:
        """No new tickets; those that are out can still be acknowledged."""


class Transport(Protocol):
    async def connect(self) -> None:
        """Returns when connected; tries again with growing delays as long as the broker is away."""

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
        """Returns when the broker has confirmed. Waits for a reconnect and publishes again when the connection broke
        (receivers are idempotent).

        Raises:
            TransportUnavailable: not confirmed within the transport's ``publish_timeout_s``.
        """

    def publish_nowait(self, exchange: str, routing_key: str, body: bytes) -> None:
        """A transient hint: sent without waiting; lost if the connection is down."""

    async def open_inbox(self, name: str, on_message: Callable[[bytes], None]) -> None:
        """Declare an exclusive transient queue bound to ``sublet.inboxes`` under its own name, and consume it without
        acknowledgements; restored after a reconnect (what was sent meanwhile is lost)."""

    async def consume_pool(
        self, queue: str, prefetch: int, on_ticket: Callable[[TicketDelivery], None]
    ) -> PoolConsumer:
        """Declare the pool's queue and consume it: at most ``prefetch`` tickets unacknowledged."""

    def ack(self, ticket: TicketDelivery) -> None:
        """Acknowledge; ignored when its channel is gone."""

    def requeue(self, ticket: TicketDelivery) -> None:
        """Requeue, for another worker; ignored when its channel is gone."""

    def on_reconnect(self, callback: Callable[[], None]) -> None:
        """Called after every reconnect, when inbox and pool consumers are there again."""

    @property
    def connected(self) -> bool: ...
