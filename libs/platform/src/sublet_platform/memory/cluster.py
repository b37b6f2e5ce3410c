"""A RabbitMQ in memory: exchanges, queues, consumers. Brokers and transports of many processes share one."""

from __future__ import annotations

import asyncio
import dataclasses
import math
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from sublet_protocol.topology import INBOXES, ExchangeType, Queue, Topology

if TYPE_CHECKING:
    from sublet_platform.memory.connection import MemoryConnection

CONSUMER_TIMEOUT_MS = 1_800_000
"""The delivery timeout of a queue without an argument for it."""

Latency = Callable[[], float]
"""Seconds until the next message of a pipe arrives. 0: the next iteration of the event loop."""


@dataclass(slots=True)
class Message:
    """One message in one queue. A requeued message returns to its ``position``."""

    body: bytes
    exchange: str
    routing_key: str
    persistent: bool
    message_id: str | None
    headers: Mapping[str, object]
    position: int = 0
    redelivered: bool = False
    returns: int = 0
    delivered_at: float = 0.0
    """Loop time of the delivery, while the message is unacknowledged."""


Receive = Callable[["Subscription", int, Message], None]
"""Receives one message of a subscription, with its delivery tag."""


class Pipe:
    """A channel that delivers in order, each item after a delay, and never before the item ahead of it."""

    def __init__(self, latency: Latency) -> None:
        self._latency = latency
        self._under_way: deque[Callable[[], None]] = deque()

    def send(self, arrive: Callable[[], None]) -> None:
        self._under_way.append(arrive)
        loop = asyncio.get_running_loop()
        delay_s = self._latency()
        if delay_s > 0:
            loop.call_later(delay_s, self._arrive)
        else:
            loop.call_soon(self._arrive)

    def cut(self) -> None:
        """Lose all items that have not arrived."""
        self._under_way.clear()

    def _arrive(self) -> None:
        if self._under_way:
            self._under_way.popleft()()


class Subscription:
    """One consumer of a queue on a channel of its own. Deliveries carry it as their channel."""

    def __init__(
        self,
        queue: MemoryQueue,
        receive: Receive,
        prefetch: int | None,
        latency: Latency,
    ) -> None:
        self.queue = queue
        self.open = True
        self.consuming = True
        self.unacked: dict[int, Message] = {}
        self._receive = receive
        self._prefetch = prefetch
        """None: no acknowledgements."""
        self._pipe = Pipe(latency)
        self._last_tag = 0

    @property
    def needs_ack(self) -> bool:
        return self._prefetch is not None

    @property
    def has_room(self) -> bool:
        return self._prefetch is None or len(self.unacked) < self._prefetch

    def deliver(self, message: Message) -> None:
        self._last_tag += 1
        tag = self._last_tag
        if self.needs_ack:
            message.delivered_at = asyncio.get_running_loop().time()
            self.unacked[tag] = message
        # The flag at this time. The message may be requeued again before it arrives.
        sent = dataclasses.replace(message)
        self._pipe.send(lambda: self._hand_over(tag, sent))

    def holds_for_longer_than(self, held_s: float | None) -> bool:
        """True if a delivery has been unacknowledged for longer than ``held_s``, or (None) than its queue allows."""
        if held_s is None:
            held_s = int(self.queue.spec.arguments.get("x-consumer-timeout", CONSUMER_TIMEOUT_MS)) / 1_000
        oldest = min((message.delivered_at for message in self.unacked.values()), default=math.inf)
        return asyncio.get_running_loop().time() - oldest > held_s

    def _hand_over(self, tag: int, message: Message) -> None:
        if self.open and self.consuming:
            self._receive(self, tag, message)


@dataclass(slots=True)
class MemoryQueue:
    spec: Queue
    owner: MemoryConnection | None = None
    """The connection to which this queue is exclusive. The queue is deleted with it."""
    ready: deque[Message] = field(default_factory=deque)
    subscriptions: list[Subscription] = field(default_factory=list)
    next_position: int = 0

    def pump(self) -> None:
        """Deliver ready messages to consumers within their prefetch: round robin, or to the single active consumer."""
        while self.ready and (taker := self._next_taker()) is not None:
            taker.deliver(self.ready.popleft())

    def _next_taker(self) -> Subscription | None:
        candidates = self.subscriptions[:1] if self.spec.single_active_consumer else self.subscriptions
        for subscription in candidates:
            if subscription.has_room:
                if not self.spec.single_active_consumer:
                    self.subscriptions.remove(subscription)
                    self.subscriptions.append(subscription)
                return subscription
        return None


class MemoryCluster:
    """``latency`` delays every hop: to the cluster, from it, and of confirms."""

    def __init__(self, latency: Latency = lambda: 0.0) -> None:
        self.latency = latency
        self.running = True
        self.queues: dict[str, MemoryQueue] = {}
        self.connections: list[MemoryConnection] = []
        self._exchanges: dict[str, ExchangeType] = {INBOXES: "direct"}
        self._bindings: dict[str, list[tuple[str, str]]] = {}

    # --- declarations -------------------------------------------------------------------------------------

    def declare(self, topology: Topology) -> None:
        for exchange in topology.exchanges:
            self._exchanges[exchange.name] = exchange.type
        for queue in topology.queues:
            self.declare_queue(queue)
        for binding in topology.bindings:
            self.bind(binding.exchange, binding.queue, binding.routing_key)

    def declare_queue(self, spec: Queue, owner: MemoryConnection | None = None) -> None:
        if spec.name not in self.queues:
            self.queues[spec.name] = MemoryQueue(spec, owner)

    def bind(self, exchange: str, queue: str, routing_key: str) -> None:
        bound = self._bindings.setdefault(exchange, [])
        if (routing_key, queue) not in bound:
            bound.append((routing_key, queue))

    def delete_queue(self, name: str) -> None:
        if self.queues.pop(name, None) is not None:
            for bound in self._bindings.values():
                bound[:] = [each for each in bound if each[1] != name]

    # --- messages -----------------------------------------------------------------------------------------

    def route(self, message: Message) -> int:
        """Put a copy into every matching queue. Returns the number of queues.

        Raises:
            KeyError: no such exchange.
        """
        names = self._destinations(message.exchange, message.routing_key)
        for name in names:
            queue = self.queues[name]
            queue.next_position += 1
            queue.ready.append(dataclasses.replace(message, position=queue.next_position))
            queue.pump()
        return len(names)

    def _destinations(self, exchange: str, routing_key: str) -> list[str]:
        if exchange == "":
            return [routing_key] if routing_key in self.queues else []
        kind = self._exchanges[exchange]
        bound = self._bindings.get(exchange, [])
        return list(dict.fromkeys(queue for pattern, queue in bound if _fits(kind, pattern, routing_key)))

    def settle(self, subscription: Subscription, tags: list[int]) -> None:
        for tag in tags:
            subscription.unacked.pop(tag, None)
        subscription.queue.pump()

    def requeue(self, subscription: Subscription, tags: list[int]) -> None:
        """Requeue messages at their positions, marked as redelivered. Dead-letter those beyond the delivery limit."""
        self._return(subscription, tags)
        subscription.queue.pump()

    def _return(self, subscription: Subscription, tags: list[int]) -> None:
        queue = subscription.queue
        limit = queue.spec.arguments.get("x-delivery-limit")
        for tag in tags:
            message = subscription.unacked.pop(tag, None)
            if message is None:
                continue
            message.redelivered = True
            message.returns += 1
            if limit is not None and message.returns > int(limit):
                dead_letter_exchange = str(queue.spec.arguments["x-dead-letter-exchange"])
                self.route(dataclasses.replace(message, exchange=dead_letter_exchange, redelivered=False, returns=0))
            else:
                queue.ready.append(message)
        queue.ready = deque(sorted(queue.ready, key=lambda message: message.position))

    # --- consumers ----------------------------------------------------------------------------------------

    def subscribe(self, queue: str, receive: Receive, prefetch: int | None) -> Subscription:
        """Raises KeyError if the queue does not exist."""
        state = self.queues[queue]
        subscription = Subscription(state, receive, prefetch, self.latency)
        state.subscriptions.append(subscription)
        state.pump()
        return subscription

    def unsubscribe(self, subscription: Subscription) -> None:
        """Stop deliveries. Unacknowledged ones can still be settled."""
        self._remove(subscription)
        subscription.queue.pump()

    def close(self, subscriptions: list[Subscription]) -> None:
        """Close their channels at once. Unacknowledged messages are requeued ahead of those never delivered."""
        for subscription in subscriptions:
            subscription.open = False
            self._remove(subscription)
        for subscription in subscriptions:
            self._return(subscription, list(subscription.unacked))
        for subscription in subscriptions:
            subscription.queue.pump()

    def _remove(self, subscription: Subscription) -> None:
        subscription.consuming = False
        queue = subscription.queue
        if subscription in queue.subscriptions:
            queue.subscriptions.remove(subscription)
        if queue.owner is not None:
            self.delete_queue(queue.spec.name)

    # --- outages ------------------------------------------------------------------------------------------

    def time_out_deliveries(self, held_s: float | None = None) -> None:
        """Close each channel with a delivery unacknowledged for longer than ``held_s`` (None: than its queue allows).
        Its deliveries are requeued. RabbitMQ checks once a minute, this cluster only in this call."""
        for connection in list(self.connections):
            connection.time_out_deliveries(held_s)

    def stop(self) -> None:
        """Stop the broker. All connections and transient messages are lost."""
        self.running = False
        for connection in list(self.connections):
            connection.kill_connection()
        for queue in self.queues.values():
            queue.ready = deque(message for message in queue.ready if message.persistent)

    def start(self) -> None:
        """Start the broker again. Connections restore themselves."""
        self.running = True
        for connection in list(self.connections):
            connection.reconnect_soon()


def _fits(kind: ExchangeType, pattern: str, routing_key: str) -> bool:
    if kind == "fanout":
        return True
    if kind == "direct":
        return pattern == routing_key
    return _topic_fits(pattern.split("."), routing_key.split("."))


def _topic_fits(pattern: list[str], words: list[str]) -> bool:
    if not pattern:
        return not words
    if pattern[0] == "#":
        return any(_topic_fits(pattern[1:], words[skipped:]) for skipped in range(len(words) + 1))
    return bool(words) and pattern[0] in ("*", words[0]) and _topic_fits(pattern[1:], words[1:])
