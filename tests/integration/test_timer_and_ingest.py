"""Timer and event-ingest with a real RabbitMQ and MongoDB: cut connections, takeovers, events of any AMQP client."""

from __future__ import annotations

import contextlib
import json
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

import aio_pika
import pytest

from sublet_event_ingest.metrics import IngestMetrics
from sublet_event_ingest.service import IngestService
from sublet_platform.clock import SystemClock
from sublet_platform.metrics import ServiceMetrics, new_registry
from sublet_platform.mongo.client import Mongo
from sublet_platform.mongo.events import MongoEventStore
from sublet_platform.mongo.runs import MongoRunStore
from sublet_platform.mongo.timers import MongoTimerStore
from sublet_platform.ports import Delivery, Outgoing
from sublet_platform.rabbit.broker import Rabbit, declare_topology
from sublet_protocol.messages import (
    CancelTimer,
    EventMatched,
    Record,
    RegisterTriggers,
    RunRequest,
    SetTimer,
    Subscribe,
    Tick,
    TimerFired,
    decode_for_shard,
    encode,
)
from sublet_protocol.specs import EventCondition
from sublet_protocol.topology import EVENTS, INGEST, TIMERS, shard_queue, topology
from sublet_timer.metrics import TimerMetrics
from sublet_timer.service import TimerService
from support.databases import fresh_database
from support.polling import short_delay, until
from support.proxies import Proxy
from support.servers import Servers

pytestmark = pytest.mark.real

SHARDS = 4


class StackHarness:
    """The servers, and the messages that arrive at the shards."""

    def __init__(self, amqp_url: str, mongo: Mongo) -> None:
        self.amqp_url = amqp_url
        self.mongo = mongo
        self.user = Rabbit(amqp_url)
        self.fired: dict[str, float] = {}
        self.ticks: set[int] = set()
        self.woken: dict[str, Any] = {}
        self.runs: list[RunRequest] = []

    async def open(self) -> None:
        await declare_topology(self.amqp_url, SHARDS)
        await _purge(self.amqp_url)
        await self.user.open()
        for shard in range(SHARDS):
            await self.user.consume(shard_queue(shard), self._receiver(shard), prefetch=1_000)

    def _receiver(self, shard: int):  # type: ignore[no-untyped-def]
        def receive(delivery: Delivery) -> None:
            for message in decode_for_shard(delivery.body):
                match message:
                    case Tick():
                        self.ticks.add(shard)
                    case TimerFired():
                        self.fired.setdefault(message.task_run_id, time.time())
                    case EventMatched():
                        self.woken.setdefault(message.task_run_id, json.loads(bytes(message.payload)))
                    case RunRequest():
                        self.runs.append(message)
            self.user.ack([delivery])

        return receive

    async def command(self, queue: str, *messages: Record) -> None:
        await self.user.publish([Outgoing("", queue, encode(messages))])

    @contextlib.asynccontextmanager
    async def timer(self) -> AsyncIterator[tuple[TimerService, Proxy]]:
        store = MongoTimerStore(self.mongo)
        await store.ensure_indexes()
        async with self._connection() as (broker, proxy):
            metrics = ServiceMetrics(new_registry())
            shell = TimerService(
                store=store,
                broker=broker,
                clock=SystemClock(),
                shards=SHARDS,
                metrics=metrics,
                timer_metrics=TimerMetrics(metrics),
            )
            await shell.start()
            yield shell, proxy
            await shell.stop()

    @contextlib.asynccontextmanager
    async def ingest(self) -> AsyncIterator[Proxy]:
        store = MongoEventStore(self.mongo)
        await store.ensure_indexes()
        async with self._connection() as (broker, proxy):
            metrics = ServiceMetrics(new_registry())
            shell = IngestService(
                store=store,
                runs=MongoRunStore(self.mongo, SystemClock()),
                broker=broker,
                clock=SystemClock(),
                new_id=lambda: str(uuid.uuid4()),
                metrics=metrics,
                ingest_metrics=IngestMetrics(metrics),
            )
            await shell.start()
            yield proxy
            await shell.stop()

    @contextlib.asynccontextmanager
    async def _connection(self) -> AsyncIterator[tuple[Rabbit, Proxy]]:
        proxy = Proxy(self.amqp_url)
        broker = Rabbit(await proxy.start())
        await broker.open()
        try:
            yield broker, proxy
        finally:
            await broker.close()
            await proxy.stop()


async def _purge(amqp_url: str) -> None:
    async with await aio_pika.connect(amqp_url) as connection:
        channel = await connection.channel()
        for queue in topology(SHARDS).queues:
            await (await channel.get_queue(queue.name)).purge()


@pytest.fixture
async def stack(servers: Servers) -> AsyncIterator[StackHarness]:
    async with fresh_database(servers.mongo_url) as mongo:
        stack = StackHarness(servers.amqp_url, mongo)
        await stack.open()
        yield stack
        await stack.user.close()


def sleeper(number: int, due: float) -> SetTimer:
    return SetTimer(id=f"timer-{number}", due=due, task_run_id=f"{number}.t", operation_id="1", key="k")


def wait(name: str, expression: str, since_s: float) -> Subscribe:
    on = EventCondition(key="c", event_key="order.paid", expression=expression)
    return Subscribe(f"wait-{name}", f"{name}.t", "1", on, int(since_s * 1_000_000))


async def test_timers_fire_when_they_are_due_and_never_early(stack: StackHarness) -> None:
    now = time.time()
    due = {f"{n}.t": now + n / 100 for n in range(-50, 150)}

    async def only_the_later_ones_are_stored() -> bool:
        return await MongoTimerStore(stack.mongo).count_timers() == 100

    async with stack.timer() as (shell, _):
        await stack.command(TIMERS, *(sleeper(n, now + n / 100) for n in range(-50, 150)))
        await stack.command(TIMERS, *(sleeper(n, now + 3_600) for n in range(1_000, 1_100)))
        await stack.command(TIMERS, sleeper(5_000, now + 0.5), CancelTimer(id="timer-5000"))
        await until(lambda: len(stack.fired) == len(due), "every timer fired")
        await until(lambda: len(stack.ticks) == SHARDS, "every shard got a tick")
        assert shell.active
        await until(only_the_later_ones_are_stored, "those that fired are forgotten")
    assert stack.fired.keys() == due.keys()
    for name, at in stack.fired.items():
        assert at >= due[name]


async def test_a_cut_connection_loses_no_timer(stack: StackHarness) -> None:
    now = time.time()
    async with stack.timer() as (_, proxy):
        for batch in range(20):
            await stack.command(TIMERS, *(sleeper(batch * 10 + n, now + 1 + n / 10) for n in range(10)))
            if batch == 10:
                proxy.cut()
        await short_delay()
        proxy.mend()
        await until(lambda: len(stack.fired) == 200, "every timer fired")


async def test_a_standby_timer_takes_over(stack: StackHarness) -> None:
    async with stack.timer() as (second, _), stack.timer() as (third, _):
        await until(lambda: second.active or third.active, "one is active")
        assert second.active is not third.active
        await stack.command(TIMERS, *(sleeper(n, time.time() + 1.5) for n in range(50)))
        active, standby = (second, third) if second.active else (third, second)
        await active.stop()
        await until(lambda: standby.active, "the other is active")
        await until(lambda: len(stack.fired) == 50, "every timer fired")


async def test_any_amqp_client_wakes_waits_and_starts_runs(stack: StackHarness) -> None:
    began = time.time()
    async with stack.ingest():
        await stack.command(INGEST, RegisterTriggers("w", ("order.*",)))
        await stack.command(INGEST, *(wait(f"{n}", f"input.order_id == {n}", began) for n in range(100)))
        async with await aio_pika.connect(stack.amqp_url) as connection:
            channel = await connection.channel()
            exchange = await channel.get_exchange(EVENTS)
            for n in range(100):
                message = aio_pika.Message(json.dumps({"order_id": n}).encode(), headers={"tenant": "x", "priority": 2})
                await exchange.publish(message, "order.paid")
            await exchange.publish(aio_pika.Message(b"no event"), "order.paid")
            await exchange.publish(aio_pika.Message(b"{}", message_id="m"), "order.sent")
            await exchange.publish(aio_pika.Message(b"{}", message_id="m"), "order.sent")
        await until(lambda: len(stack.woken) == 100, "every wait was woken")
        await until(lambda: len({run.run_id for run in stack.runs}) == 101, "every run was asked for")
        await stack.command(INGEST, wait("late", "input.order_id == 7", began), wait("never", "input.x == 1", began))
        await until(lambda: "late.t" in stack.woken, "the late wait found its event")
    assert stack.woken["7.t"] == stack.woken["late.t"] == {"order_id": 7}
    assert all(run.metadata in ({"tenant": "x"}, {}) for run in stack.runs)
    store = MongoEventStore(stack.mongo)
    assert await store.count_subscriptions() == 1
    assert len(await store.list_events(None, None, 1_000)) == 101
    async with await aio_pika.connect(stack.amqp_url) as connection:
        letter = await (await (await connection.channel()).get_queue("sublet.dead")).get(no_ack=True)
    assert letter.body == b"no event"
    assert "not JSON" in str(letter.headers["x-sublet-reason"])


async def test_a_cut_connection_loses_no_event(stack: StackHarness) -> None:
    began = time.time()
    async with stack.ingest() as proxy, stack.ingest():
        for n in range(100):
            body = json.dumps({"n": n}).encode()
            event = Outgoing(EVENTS, "order.paid", body, message_id=str(uuid.uuid4()))
            await stack.user.publish([event, Outgoing("", INGEST, encode([wait(str(n), f"input.n == {n}", began)]))])
            if n == 50:
                proxy.cut()
            if n == 80:
                proxy.mend()
        await until(lambda: len(stack.woken) == 100, "every wait was woken")
    assert len(await MongoEventStore(stack.mongo).list_events(None, None, 1_000)) == 100
