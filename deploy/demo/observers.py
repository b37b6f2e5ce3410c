"""Observation without the SDK: notices and events over plain AMQP, metrics over HTTP."""

from __future__ import annotations

import asyncio
import json
import urllib.request
from collections import Counter
from collections.abc import Sequence
from typing import Any

import aio_pika
from aio_pika.exceptions import AMQPConnectionError, ChannelNotFoundEntity
from prometheus_client.parser import text_string_to_metric_families

_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class StackUnavailable(Exception):
    """The broker or the services are not available. The text says which, and what to do."""


class AmqpObserver:
    """A plain AMQP connection. ``namespace``: what the demo's names begin with.

    ``notices`` counts by what happened and to which task or workflow: ``("task.evicted", "nap")``,
    ``("run.completed", "square")``.
    """

    def __init__(self, url: str, namespace: str) -> None:
        self.notices: Counter[tuple[str, str]] = Counter()
        self._url = url
        self._namespace = namespace
        self._connection: aio_pika.abc.AbstractConnection | None = None

    async def open(self) -> None:
        """Connect, and watch ``sublet.notices``.

        Raises:
            StackUnavailable: no broker answers, or no service has declared the exchange.
        """
        try:
            self._connection = await aio_pika.connect(self._url)
            await self._watch_notices(self._connection)
        except AMQPConnectionError as error:
            raise StackUnavailable(f"RabbitMQ does not answer ({error}). Is SUBLET_AMQP_URL right?") from error
        except ChannelNotFoundEntity as error:
            raise StackUnavailable(f"RabbitMQ is there, but no services are ({error}): `deploy/local up`.") from error

    async def _watch_notices(self, connection: aio_pika.abc.AbstractConnection) -> None:
        channel = await connection.channel()
        exchange = await channel.get_exchange("sublet.notices", ensure=False)
        # The user of a worker may declare inboxes and pool queues only.
        queue = await channel.declare_queue(f"sublet.inbox.client.{self._namespace}demo", exclusive=True)
        for happened in ("task.evicted", "run.completed"):
            await queue.bind(exchange, f"{happened}.#")
        await queue.consume(self._noticed, no_ack=True)

    async def publish_event(self, key: str, payload: dict[str, Any]) -> None:
        """Publish a JSON object to the topic exchange ``sublet.events``, as any AMQP client can."""
        assert self._connection is not None
        async with self._connection.channel() as channel:
            events = await channel.get_exchange("sublet.events", ensure=False)
            message = aio_pika.Message(json.dumps(payload).encode(), delivery_mode=aio_pika.DeliveryMode.PERSISTENT)
            await events.publish(message, routing_key=key)

    async def close(self) -> None:
        if self._connection is not None:
            await self._connection.close()

    async def _noticed(self, message: aio_pika.abc.AbstractIncomingMessage) -> None:
        kind, what, name, *_ = (message.routing_key or "").split(".")
        if name.startswith(self._namespace):
            self.notices[f"{kind}.{what}", name.removeprefix(self._namespace)] += 1


class Gauges:
    """The gauges of the schedulers, polled every `INTERVAL_S`. They are empty if no address is known.

    ``slots``: (total, taken) by (pool without namespace and digest, kind); ``waiting``: tasks by reason. Since the last
    `reset`: ``polls`` that every scheduler answered, and ``most_taken`` by (pool, kind).
    """

    INTERVAL_S = 0.2

    def __init__(self, urls: Sequence[str], namespace: str) -> None:
        self.known = bool(urls)
        self.exact = len(urls) == 1
        """False with several schedulers, because their gauges are not read at the same instant."""
        self.slots: dict[tuple[str, str], tuple[int, int]] = {}
        self.waiting: dict[str, int] = {}
        self.polls = 0
        self.most_taken: Counter[tuple[str, str]] = Counter()
        self._urls = urls
        self._namespace = namespace

    async def watch(self) -> None:
        """Poll until cancelled."""
        while self.known:
            texts = await asyncio.gather(*(asyncio.to_thread(_scrape, url) for url in self._urls))
            if all(texts):
                self._read("\n".join(texts))
            await asyncio.sleep(self.INTERVAL_S)

    def reset(self) -> None:
        """Start counting again from zero."""
        self.polls = 0
        self.most_taken.clear()

    def _read(self, text: str) -> None:
        totals: Counter[tuple[str, str]] = Counter()
        taken: Counter[tuple[str, str]] = Counter()
        waiting: Counter[str] = Counter()
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                value = int(sample.value)
                if sample.name == "sublet_waiting":
                    waiting[sample.labels["reason"]] += value
                elif sample.name == "sublet_slots" and sample.labels["pool"].startswith(self._namespace):
                    pool = sample.labels["pool"].removeprefix(self._namespace).rpartition("-")[0]
                    slot = (pool, sample.labels["kind"])
                    # Every scheduler knows all slots, but only those taken by its own shards.
                    if sample.labels["state"] == "total":
                        totals[slot] = max(totals[slot], value)
                    elif sample.labels["state"] == "taken":
                        taken[slot] += value
        self.slots = {slot: (total, taken[slot]) for slot, total in totals.items() if total}
        self.waiting = {reason: count for reason, count in waiting.items() if count > 0}
        self.polls += 1
        self.most_taken |= taken


def _scrape(url: str) -> str:
    try:
        with _DIRECT.open(url, timeout=2) as answer:
            return str(answer.read().decode())
    except OSError:
        return ""
