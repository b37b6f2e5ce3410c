"""The connection of one client to the cluster in memory. It can be closed at any time, and restores itself."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sublet_platform.memory.cluster import MemoryCluster, Message, Pipe, Receive, Subscription
from sublet_protocol.topology import INBOXES, MUST_ARRIVE, Queue


class Unconfirmed(Exception):
    """The connection was closed, the exchange is missing, or no queue accepted a mandatory message."""


@dataclass(slots=True, eq=False)
class Registration:
    """A consumer over all connections. Each new connection gives it a new subscription."""

    queue: Queue
    receive: Receive
    prefetch: int | None
    inbox_key: str | None = None
    """Routing key of an inbox; None for another queue."""
    declare: bool = False
    cancelled: bool = False
    subscription: Subscription | None = None


class MemoryConnection:
    """The common part of `MemoryBroker` and `MemoryTransport`."""

    def __init__(self, cluster: MemoryCluster) -> None:
        self.connected = cluster.running
        self._cluster = cluster
        self._closed = False
        self._registrations: list[Registration] = []
        self._unconfirmed: list[asyncio.Future[None]] = []
        self._up = Pipe(cluster.latency)
        self._down = Pipe(cluster.latency)
        self._reconnected: list[Callable[[], None]] = []
        self._up_again: list[asyncio.Future[None]] = []
        cluster.connections.append(self)

    # --- outages ------------------------------------------------------------------------------------------

    def kill_connection(self, down_s: float | None = None) -> None:
        """Close the connection abruptly: deliveries become void, messages in transit are lost. It restores itself after
        ``down_s`` seconds (None: in the next iteration of the event loop), or when the cluster runs again."""
        self._cut()
        if down_s is None:
            self.reconnect_soon()
        else:
            asyncio.get_running_loop().call_later(down_s, self._reconnect)

    def time_out_deliveries(self, held_s: float | None) -> None:
        """See `MemoryCluster.time_out_deliveries`."""
        for registration in list(self._registrations):
            subscription = registration.subscription
            if subscription is not None and subscription.holds_for_longer_than(held_s):
                self._channel_closed(registration)

    def _channel_closed(self, registration: Registration) -> None:
        """Close one channel, as the broker does. A client with robust channels opens it again."""
        assert registration.subscription is not None
        self._cluster.close([registration.subscription])
        registration.subscription = None
        asyncio.get_running_loop().call_soon(self._open_again, registration)

    def _open_again(self, registration: Registration) -> None:
        there = registration in self._registrations and registration.subscription is None
        if self.connected and there and not registration.cancelled:
            self._start(registration)

    def reconnect_soon(self) -> None:
        asyncio.get_running_loop().call_soon(self._reconnect)

    def _cut(self) -> None:
        self.connected = False
        self._up.cut()
        self._down.cut()
        subscriptions = [each.subscription for each in self._registrations if each.subscription is not None]
        for registration in self._registrations:
            registration.subscription = None
        self._cluster.close(subscriptions)
        lost, self._unconfirmed = self._unconfirmed, []
        for future in lost:
            if not future.done():
                future.set_exception(Unconfirmed("the connection was cut"))

    def _reconnect(self) -> None:
        if self.connected or self._closed or not self._cluster.running:
            return
        self.connected = True
        for registration in self._registrations:
            if not registration.cancelled:
                self._start(registration)
        waiting, self._up_again = self._up_again, []
        for future in waiting:
            if not future.done():
                future.set_result(None)
        for callback in self._reconnected:
            callback()

    async def _until_connected(self) -> None:
        while not self.connected:
            future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._up_again.append(future)
            await future

    async def close(self) -> None:
        """Close gracefully: sent messages still arrive, unacknowledged deliveries are requeued."""
        await self._flush()
        self._closed = True
        self._cut()
        if self in self._cluster.connections:
            self._cluster.connections.remove(self)

    # --- consuming ----------------------------------------------------------------------------------------

    def _register(self, registration: Registration) -> None:
        """Raises KeyError if the queue does not exist."""
        self._start(registration)
        self._registrations.append(registration)

    def _start(self, registration: Registration) -> None:
        name = registration.queue.name
        if registration.inbox_key is not None:
            self._cluster.declare_queue(registration.queue, owner=self)
            self._cluster.bind(INBOXES, name, registration.inbox_key)
        elif registration.declare:
            self._cluster.declare_queue(registration.queue)
        registration.subscription = self._cluster.subscribe(name, registration.receive, registration.prefetch)

    def _cancel(self, registration: Registration) -> None:
        registration.cancelled = True
        if registration.subscription is not None:
            self._cluster.unsubscribe(registration.subscription)

    async def _close(self, registration: Registration) -> None:
        await self._flush()
        if registration in self._registrations:
            self._registrations.remove(registration)
        if registration.subscription is not None:
            self._cluster.close([registration.subscription])
            registration.subscription = None

    def _settle(self, subscription: Subscription, tags: list[int]) -> None:
        self._up.send(lambda: self._cluster.settle(subscription, tags))

    def _requeue(self, subscription: Subscription, tags: list[int]) -> None:
        self._up.send(lambda: self._cluster.requeue(subscription, tags))

    # --- publishing ---------------------------------------------------------------------------------------

    def _send(self, messages: Sequence[Message]) -> None:
        def arrive() -> None:
            self._route(messages)

        if self.connected:
            self._up.send(arrive)

    async def _send_confirmed(self, messages: Sequence[Message]) -> None:
        """Raises Unconfirmed."""
        if not self.connected:
            raise Unconfirmed("not connected")
        confirmed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._unconfirmed.append(confirmed)

        def arrive() -> None:
            refused = self._route(messages)
            self._down.send(lambda: self._confirm(confirmed, refused))

        self._up.send(arrive)
        await confirmed

    def _route(self, messages: Sequence[Message]) -> str | None:
        """The reason why a message was not accepted; None if all were."""
        refused = None
        for message in messages:
            try:
                taken = self._cluster.route(message)
            except KeyError:
                refused = f"there is no exchange {message.exchange!r}"
                continue
            if not taken and message.exchange in MUST_ARRIVE:
                refused = f"no queue takes {message.routing_key!r} from exchange {message.exchange!r}"
        return refused

    def _confirm(self, confirmed: asyncio.Future[None], refused: str | None) -> None:
        if confirmed in self._unconfirmed:
            self._unconfirmed.remove(confirmed)
        if confirmed.done():
            return
        if refused is None:
            confirmed.set_result(None)
        else:
            confirmed.set_exception(Unconfirmed(refused))

    async def _flush(self) -> None:
        """Wait until everything sent so far has arrived or is lost."""
        if not self.connected:
            return
        arrived: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._unconfirmed.append(arrived)
        self._up.send(lambda: self._confirm(arrived, None))
        try:
            await arrived
        except Unconfirmed:
            return
