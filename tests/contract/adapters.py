"""Brokers for the contract tests: RabbitMQ, and the one in memory."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from typing import Protocol

from sublet._amqp.adapter import AmqpTransport
from sublet._amqp.transport import Transport
from sublet._errors import TransportUnavailable
from sublet_platform.memory import MemoryBroker, MemoryCluster, MemoryTransport
from sublet_platform.ports import Broker, Delivery
from sublet_platform.rabbit.broker import Rabbit, declare
from sublet_protocol.topology import INBOXES, Binding, Exchange, Queue, Topology
from support.proxies import Proxy


class World(Protocol):
    """A message broker with clients whose connections can be cut."""

    async def declare(self, topology: Topology) -> None: ...

    async def client(self) -> Broker: ...

    def cut(self, client: Broker) -> None:
        """Break the connection of the client, and refuse new ones."""

    def mend(self, client: Broker) -> None:
        """Allow new connections. The client reconnects by itself."""

    async def worker(self, *, publish_timeout_s: float = 30.0) -> Transport:
        """A connected transport of the SDK."""

    def cut_worker(self, worker: Transport) -> None: ...

    def mend_worker(self, worker: Transport) -> None: ...

    async def stop(self) -> None: ...


class MemoryWorld:
    def __init__(self) -> None:
        self._cluster = MemoryCluster()

    async def declare(self, topology: Topology) -> None:
        self._cluster.declare(topology)

    async def client(self) -> Broker:
        return MemoryBroker(self._cluster)

    def cut(self, client: Broker) -> None:
        assert isinstance(client, MemoryBroker)
        client.kill_connection(down_s=3_600.0)

    def mend(self, client: Broker) -> None:
        assert isinstance(client, MemoryBroker)
        client.reconnect_soon()

    async def worker(self, *, publish_timeout_s: float = 30.0) -> Transport:
        worker = MemoryTransport(self._cluster, publish_timeout_s=publish_timeout_s, unavailable=TransportUnavailable)
        await worker.connect()
        return worker

    def cut_worker(self, worker: Transport) -> None:
        assert isinstance(worker, MemoryTransport)
        worker.kill_connection(down_s=3_600.0)

    def mend_worker(self, worker: Transport) -> None:
        assert isinstance(worker, MemoryTransport)
        worker.reconnect_soon()

    async def stop(self) -> None:
        for connection in list(self._cluster.connections):
            await connection.close()


class RabbitWorld:
    def __init__(self, url: str) -> None:
        self._url = url
        self._proxies: dict[int, Proxy] = {}
        self._clients: list[Rabbit | AmqpTransport] = []

    async def declare(self, topology: Topology) -> None:
        await declare(self._url, topology)

    async def client(self) -> Broker:
        proxy = Proxy(self._url)
        rabbit = Rabbit(await proxy.start())
        await rabbit.open()
        self._proxies[id(rabbit)] = proxy
        self._clients.append(rabbit)
        return rabbit

    def cut(self, client: Broker) -> None:
        self._proxies[id(client)].cut()

    def mend(self, client: Broker) -> None:
        self._proxies[id(client)].mend()

    async def worker(self, *, publish_timeout_s: float = 30.0) -> Transport:
        proxy = Proxy(self._url)
        worker = AmqpTransport(await proxy.start(), publish_timeout_s=publish_timeout_s)
        await worker.connect()
        self._proxies[id(worker)] = proxy
        self._clients.append(worker)
        return worker

    def cut_worker(self, worker: Transport) -> None:
        self._proxies[id(worker)].cut()

    def mend_worker(self, worker: Transport) -> None:
        self._proxies[id(worker)].mend()

    async def stop(self) -> None:
        for client in self._clients:
            await client.close()
            await self._proxies[id(client)].stop()


def unique(what: str) -> str:
    return f"sublet.test.{what}.{uuid.uuid4().hex}"


EXPIRES_MS = 600_000
"""RabbitMQ deletes the queues of tests ten minutes after their last use."""


async def new_queue(world: World, *, quorum: bool = False, **arguments: str | int | bool) -> str:
    """Declare a new queue. ``arguments`` have the names of RabbitMQ, with underscores."""
    name = unique("queue")
    named: Mapping[str, str | int | bool] = {
        "x-expires": EXPIRES_MS,
        **({"x-queue-type": "quorum"} if quorum else {}),
        **{key.replace("_", "-"): value for key, value in arguments.items()},
    }
    await world.declare(Topology((Exchange(INBOXES, "direct"),), (Queue(name, named),), ()))
    return name


async def new_exchange(world: World, kind: str, bindings: Mapping[str, str]) -> str:
    """Declare a new exchange. ``bindings`` gives the routing keys of existing queues."""
    name = unique("exchange")
    queues = tuple(Queue(queue, {"x-expires": EXPIRES_MS}) for queue in bindings)
    bound = tuple(Binding(name, queue, key) for queue, key in bindings.items())
    await world.declare(Topology((Exchange(name, kind),), queues, bound))  # type: ignore[arg-type]
    return name


class Inbox(list[Delivery]):
    """A handler that stores its deliveries."""

    def __call__(self, delivery: Delivery) -> None:
        self.append(delivery)

    @property
    def bodies(self) -> list[bytes]:
        return [delivery.body for delivery in self]
