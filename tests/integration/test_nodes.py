"""Failover between the nodes of an AMQP URL: both adapters find the next node when one goes down.

The nodes are proxies of one broker, because only the order of the attempts matters. `acceptance/test_clusters.py` has
a real cluster.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from functools import partial

import pytest

from contract.adapters import Inbox
from sublet._amqp.adapter import AmqpTransport
from sublet._amqp.transport import TicketDelivery
from sublet._errors import TransportUnavailable
from sublet_platform.ports import BrokerUnavailable, Delivery, Outgoing
from sublet_platform.rabbit.broker import Rabbit, declare
from sublet_protocol.topology import Queue, Topology
from support.polling import until
from support.proxies import Proxy
from support.servers import RabbitServer

pytestmark = pytest.mark.real

NOBODY = "amqp://guest:guest@127.0.0.1:1/"
QUEUE = "sublet.test.nodes"


class Nodes:
    """``urls``: first an address without a server, then two that lead to the broker."""

    def __init__(self, server: RabbitServer) -> None:
        self._proxies = [Proxy(server.url) for _ in range(2)]
        self.urls = NOBODY

    async def start(self) -> None:
        self.urls = ",".join([NOBODY, *[await proxy.start() for proxy in self._proxies]])

    def cut_all_but(self, index: int) -> None:
        self._proxies[index].mend()
        self._proxies[1 - index].cut()

    async def stop(self) -> None:
        for proxy in self._proxies:
            await proxy.stop()


@pytest.fixture
async def nodes(own_rabbit: RabbitServer) -> AsyncIterator[Nodes]:
    nodes = Nodes(own_rabbit)
    await nodes.start()
    await declare(nodes.urls, Topology((), (Queue(QUEUE, {"x-queue-type": "quorum"}),), ()))
    yield nodes
    await nodes.stop()


async def test_a_service_fails_over_with_its_consumers(nodes: Nodes) -> None:
    service = Rabbit(nodes.urls)
    await service.open()
    inbox = Inbox()
    await service.consume(QUEUE, inbox, prefetch=100)
    for turn, reachable in enumerate((0, 1, 0, 1)):
        nodes.cut_all_but(reachable)
        body = b"%d" % turn
        await until(partial(_published, service, body), "it publishes through the node that is left")
        await until(partial(_received, inbox, body), "its consumer is there too")
    await service.close()


async def _published(service: Rabbit, body: bytes) -> bool:
    try:
        await service.publish([Outgoing("", QUEUE, body)])
    except BrokerUnavailable:
        return False
    return True


async def test_a_worker_fails_over_with_its_consumers(nodes: Nodes) -> None:
    worker = AmqpTransport(nodes.urls)
    await worker.connect()
    tickets: list[TicketDelivery] = []
    pool = "sublet.pool.nodes-12345678.task"
    await worker.consume_pool(pool, 10, tickets.append)
    for turn, reachable in enumerate((0, 1, 0, 1)):
        nodes.cut_all_but(reachable)
        body = b"%d" % turn
        await asyncio.wait_for(worker.publish("", pool, body), 20)
        await until(partial(_received, tickets, body), "its consumer is there too")
    await worker.close()


def _received(deliveries: Sequence[Delivery | TicketDelivery], body: bytes) -> bool:
    return any(delivery.body == body for delivery in deliveries)


async def test_a_refused_message_does_not_affect_the_others(own_rabbit: RabbitServer) -> None:
    """The adapter closes the channel for it, while other messages on that channel are not confirmed yet."""
    full: dict[str, str | int | bool] = {"x-queue-type": "quorum", "x-max-length": 1, "x-overflow": "reject-publish"}
    queues = Queue("sublet.test.full", full), Queue(QUEUE, {"x-queue-type": "quorum"})
    await declare(own_rabbit.url, Topology((), queues, ()))
    worker = AmqpTransport(own_rabbit.url, publish_timeout_s=5.0)
    await worker.connect()
    for _ in range(2):
        await worker.publish("", "sublet.test.full", b"x")
    refused = asyncio.gather(*(worker.publish("", "sublet.test.full", b"x") for _ in range(4)), return_exceptions=True)
    for _ in range(20):
        await asyncio.gather(*(worker.publish("", QUEUE, b"x") for _ in range(20)))
    assert any(isinstance(outcome, TransportUnavailable) for outcome in await refused)
    await worker.close()
