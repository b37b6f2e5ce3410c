"""The broker of the simulation: the in-memory RabbitMQ, with observers and injected faults."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from random import Random
from typing import Any, Protocol

from simulation.system.processes import Process, ProcessLoop
from sublet._errors import TransportUnavailable
from sublet_platform.memory import MemoryBroker, MemoryCluster, MemoryTransport
from sublet_platform.memory.cluster import Message, Subscription
from sublet_platform.memory.connection import MemoryConnection, Registration
from sublet_protocol.topology import EVENTS

RECONNECT_MAX_S = 0.5
"""Maximum time until a connection is restored after a lost confirm."""


class Watcher(Protocol):
    """Sees every message."""

    def sent(self, sender: Process, message: Message) -> None:
        """A message arrives at the broker."""

    def received(self, receiver: Process, subscription: Subscription, tag: int, message: Message) -> None:
        """A message arrives at a process, which has not seen it yet."""

    def acked(self, sender: Process, ticket: Any) -> None:
        """A worker acknowledges a ticket."""


class NetworkConditions:
    """How the network treats messages at present. Times in seconds of virtual time."""

    def __init__(self, random: Random) -> None:
        self._random = random
        self.latency_s = 0.0
        """Maximum of an ordinary hop."""
        self.delay_s = 0.0
        """One hop in five takes up to this much longer."""
        self.doubling = 0.0
        """Probability that a message is published twice."""
        self.doubled_after_s = 0.0

    def hop_s(self) -> float:
        hop_s = self._random.random() * self.latency_s
        if self.delay_s and self._random.random() < 0.2:
            hop_s += self._random.random() * self.delay_s
        return hop_s

    def doubles_after_s(self) -> float | None:
        if self.doubling and self._random.random() < self.doubling:
            return self._random.random() * self.doubled_after_s
        return None


class Cluster(MemoryCluster):
    def __init__(self, loop: ProcessLoop, conditions: NetworkConditions, watcher: Watcher) -> None:
        super().__init__(conditions.hop_s)
        self.loop = loop
        self.conditions = conditions
        self.watcher = watcher

    def arrive(self, sender: Process, message: Message) -> None:
        """Called for each message before it is routed."""
        self.watcher.sent(sender, message)
        again_after_s = self.conditions.doubles_after_s()
        if again_after_s is not None and _may_come_twice(message):
            copy = dataclasses.replace(message)
            self.loop.call_later(again_after_s, self._again, sender, copy)

    def _again(self, sender: Process, message: Message) -> None:
        if self.running:
            self.watcher.sent(sender, message)
            self.route(message)


def _may_come_twice(message: Message) -> bool:
    """Tickets are never published twice, and an event without an id would count as another event."""
    is_ticket = message.exchange == "" and message.routing_key.startswith("sublet.pool.")
    return not is_ticket and (message.exchange != EVENTS or message.message_id is not None)


class _Link(MemoryConnection):
    """The connection of one process to the cluster.

    ``loses_confirms``: the probability that the connection breaks after a publish, before its confirm.
    """

    loop: ProcessLoop
    process: Process
    cluster: Cluster
    random: Random
    loses_confirms = 0.0

    def _register(self, registration: Registration) -> None:
        receive = registration.receive

        def step(subscription: Subscription, tag: int, message: Message) -> None:
            self.cluster.watcher.received(self.process, subscription, tag, message)
            receive(subscription, tag, message)

        registration.receive = lambda *args: self.loop.run_as(self.process, step, *args)
        super()._register(registration)

    def _route(self, messages: Sequence[Message]) -> str | None:
        for message in messages:
            self.cluster.arrive(self.process, message)
        refused = super()._route(messages)
        if self.loses_confirms and self.random.random() < self.loses_confirms:
            self.loop.call_soon(self.kill_connection, self.random.random() * RECONNECT_MAX_S)
        return refused

    def vanish(self, flush: bool) -> None:
        """The process has died. ``flush``: messages that it had written to the socket still arrive."""
        if flush:
            while self._up._under_way:
                self._up._arrive()
        self._closed = True
        self._cut()
        if self in self._cluster.connections:
            self._cluster.connections.remove(self)


class Broker(_Link, MemoryBroker):
    """See `ports.Broker`."""

    def __init__(self, cluster: Cluster, process: Process, random: Random) -> None:
        super().__init__(cluster)
        self.loop, self.process, self.cluster, self.random = cluster.loop, process, cluster, random


class Transport(_Link, MemoryTransport):
    """See ``sublet._amqp.transport.Transport``."""

    def __init__(self, cluster: Cluster, process: Process, random: Random) -> None:
        super().__init__(cluster, unavailable=TransportUnavailable)
        self.loop, self.process, self.cluster, self.random = cluster.loop, process, cluster, random

    def ack(self, ticket: Any) -> None:
        if ticket.channel.open:
            self.cluster.watcher.acked(self.process, ticket)
        super().ack(ticket)

    def on_reconnect(self, callback: Callable[[], None]) -> None:
        super().on_reconnect(lambda: self.loop.run_as(self.process, callback))
