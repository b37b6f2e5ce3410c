"""With the users of `deploy/rabbitmq/users.py` everybody can do their work, and nothing else."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from typing import Any

import aio_pika
import pytest
from aio_pika.abc import AbstractChannel
from aiormq.abc import DeliveredMessage
from aiormq.exceptions import ChannelAccessRefused, ChannelLockedResource, ChannelPreconditionFailed

from acceptance.environment import Environment, short_delay
from acceptance.restricted_users import PUBLISHER, SERVICE, WORKER, GuardedStack, guarded_stack
from acceptance.stack import Stack
from sublet_protocol.topology import topology

pytestmark = pytest.mark.real

DECLARED_SHARDS = 4
DECLARED = topology(DECLARED_SHARDS)
EXCHANGES = {exchange.name for exchange in DECLARED.exchanges}
QUEUES = {queue.name for queue in DECLARED.queues}


@pytest.fixture(scope="module")
def stack(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[GuardedStack]:
    """In the place of the shared one, which would not be there if this one could not be."""
    with guarded_stack(tmp_path_factory.mktemp("guarded")) as guarded:
        yield guarded


async def test_services_workers_clients_and_publishers_can_do_their_work(
    environment: Environment, stack: GuardedStack
) -> None:
    """The services declare everything, the worker its queues and inbox; there are runs, children, waits and queries."""
    await environment.worker("durable_dag", "await_payment", "double", slots=1, durable_slots=1)
    durable_dag = await environment.workflows.durable_dag.aio_run(environment.workflows.Number(n=1))
    assert durable_dag["finish"] == {"n": 2}
    waiting = await environment.workflows.await_payment.aio_run(
        environment.workflows.Number(n=7), wait_for_result=False
    )
    await environment.until_evicted(waiting.workflow_run_id)
    async with channel_of(stack, PUBLISHER) as channel:
        await publish(channel, "sublet.events", f"{environment.namespace}paid", b'{"order": 7, "amount": 1}')
    assert (await waiting.aio_result()).order == 7


async def test_a_publisher_may_publish_events_and_nothing_else(stack: GuardedStack) -> None:
    async with channel_of(stack, PUBLISHER) as channel:
        await publish(channel, "sublet.events", "seen.by.nobody", b"{}")
    for exchange in EXCHANGES - {"sublet.events"}:
        await refused(stack, PUBLISHER, publish, exchange, "bucket.00")
    await may_not_touch_what_services_own(stack, PUBLISHER)
    for name in (None, "sublet.inbox.client.x", "sublet.pool.x.task", "my-own"):
        await refused(stack, PUBLISHER, declare, name)
        await refused(stack, PUBLISHER, declare_exchange, name or "amq.mine")
    for exchange in EXCHANGES | {"amq.topic"}:
        await refused(stack, PUBLISHER, bind_exchange, "sublet.events", exchange)
        await refused(stack, PUBLISHER, unbind_exchange, "sublet.events", exchange)


async def test_nobody_may_publish_in_the_name_of_another(stack: GuardedStack) -> None:
    for user in (PUBLISHER, WORKER):
        async with channel_of(stack, user) as channel:
            await publish(channel, "sublet.events", "mine", b"{}", user_id=user)
        for other in (SERVICE, "guest"):
            async with channel_of(stack, user) as channel:
                with pytest.raises(ChannelPreconditionFailed):
                    await publish(channel, "sublet.events", "forged", b"{}", user_id=other)


async def test_what_a_publisher_asks_for_an_answer_to_is_not_answered(stack: GuardedStack) -> None:
    """Anybody may listen on the broker's own queue for direct replies: nothing that reads events writes there."""
    async with channel_of(stack, PUBLISHER) as channel:
        answers: list[DeliveredMessage] = []
        underlay = await channel.get_underlay_channel()
        await underlay.basic_consume("amq.rabbitmq.reply-to", _keep(answers), no_ack=True)
        await publish(channel, "sublet.events", "asked", b"{}", reply_to="amq.rabbitmq.reply-to", correlation_id="c")
        await publish(channel, "sublet.events", "asked", b"no JSON", reply_to="amq.rabbitmq.reply-to")
        await short_delay()
        assert answers == []


async def test_neither_publisher_nor_worker_may_change_or_remove_an_exchange_of_the_services(
    stack: GuardedStack,
) -> None:
    for user in (PUBLISHER, WORKER):
        for exchange in EXCHANGES:
            await refused(stack, user, delete_exchange, exchange)
            await refused(stack, user, declare_exchange, exchange)
            await refused(stack, user, bind_exchange, "sublet.dead", exchange)
            await refused(stack, user, bind_exchange, "sublet.notices", exchange)


async def test_a_worker_may_neither_read_nor_forge_what_services_tell_each_other(stack: GuardedStack) -> None:
    for exchange in ("sublet.notices", "sublet.dead"):
        await refused(stack, WORKER, publish, exchange, "")
    await may_not_touch_what_services_own(stack, WORKER)
    await refused(stack, WORKER, declare, "my-own")
    for exchange in ("sublet.requests", "sublet.workers", "sublet.events", "sublet.dead"):
        await refused(stack, WORKER, bind, "sublet.inbox.client.mine", exchange)
    await refused(stack, WORKER, declare_with, {"x-dead-letter-exchange": "sublet.dead"})
    await refused(stack, WORKER, declare_with, {"x-dead-letter-exchange": "sublet.notices"})
    await refused(stack, WORKER, declare_exchange, "sublet.inbox.mine", "sublet.dead")


async def test_a_worker_may_not_put_messages_where_tickets_are_expected(
    environment: Environment, stack: GuardedStack
) -> None:
    await environment.worker("double", slots=1)
    (pool,) = [name for name in queues(stack) if name.startswith("sublet.pool.") and environment.namespace in name]
    await refused(stack, WORKER, publish, "", pool)
    for exchange in EXCHANGES:
        await refused(stack, WORKER, bind, pool, exchange)
    assert (await environment.workflows.double.aio_run(environment.workflows.Number(n=2))).n == 4


async def test_the_inbox_of_a_process_is_its_own(environment: Environment, stack: GuardedStack) -> None:
    """With the same user on another connection; publishers have no rights there at all."""
    await environment.worker("double", slots=1)
    await environment.workflows.double.aio_run(environment.workflows.Number(n=1))
    inboxes = [name for name in queues(stack) if name.startswith("sublet.inbox.")]
    assert len(inboxes) > DECLARED_SHARDS, "of the schedulers, the worker and the client"
    for inbox in inboxes:
        for deed in (get, purge, delete):
            await refused(stack, PUBLISHER, deed, inbox)
            async with channel_of(stack, WORKER) as channel:
                with pytest.raises(ChannelLockedResource):
                    await deed(channel, inbox)
    assert (await environment.workflows.double.aio_run(environment.workflows.Number(n=2))).n == 4


def queues(stack: GuardedStack) -> list[str]:
    return stack.rabbit.ctl("list_queues", "name").split()


async def may_not_touch_what_services_own(stack: GuardedStack, user: str) -> None:
    for queue in QUEUES:
        await refused(stack, user, publish, "", queue)
        await refused(stack, user, get, queue)
        await refused(stack, user, purge, queue)
        await refused(stack, user, delete, queue)
        await refused(stack, user, consume, queue)
        for exchange in EXCHANGES:
            await refused(stack, user, bind, queue, exchange)
            await refused(stack, user, unbind, queue, exchange)


async def refused(stack: GuardedStack, user: str, deed: Callable[..., Awaitable[None]], *names: Any) -> None:
    async with channel_of(stack, user) as channel:
        with pytest.raises(ChannelAccessRefused):
            await deed(channel, *names)


async def publish(
    channel: AbstractChannel, exchange: str, routing_key: str, body: bytes = b"[]", **properties: Any
) -> None:
    where = await channel.get_exchange(exchange, ensure=False) if exchange else channel.default_exchange
    await where.publish(aio_pika.Message(body, **properties), routing_key, timeout=10)


async def declare(channel: AbstractChannel, queue: str | None) -> None:
    await channel.declare_queue(queue, exclusive=True)


async def declare_with(channel: AbstractChannel, arguments: dict[str, Any]) -> None:
    await channel.declare_queue("sublet.inbox.client.mine", exclusive=True, arguments=arguments)


async def declare_exchange(channel: AbstractChannel, exchange: str, alternate: str = "") -> None:
    arguments: dict[str, Any] = {"alternate-exchange": alternate} if alternate else {}
    await (await channel.get_underlay_channel()).exchange_declare(exchange, auto_delete=True, arguments=arguments)


async def delete_exchange(channel: AbstractChannel, exchange: str) -> None:
    await (await channel.get_underlay_channel()).exchange_delete(exchange)


async def bind_exchange(channel: AbstractChannel, destination: str, source: str) -> None:
    await (await channel.get_underlay_channel()).exchange_bind(destination, source, "#")


async def unbind_exchange(channel: AbstractChannel, destination: str, source: str) -> None:
    await (await channel.get_underlay_channel()).exchange_unbind(destination, source, "#")


async def delete(channel: AbstractChannel, queue: str) -> None:
    await channel.queue_delete(queue)


async def get(channel: AbstractChannel, queue: str) -> None:
    await (await channel.get_underlay_channel()).basic_get(queue)


async def purge(channel: AbstractChannel, queue: str) -> None:
    await (await channel.get_underlay_channel()).queue_purge(queue)


async def bind(channel: AbstractChannel, queue: str, exchange: str) -> None:
    await (await channel.get_underlay_channel()).queue_bind(queue, exchange, "#")


async def unbind(channel: AbstractChannel, queue: str, exchange: str) -> None:
    await (await channel.get_underlay_channel()).queue_unbind(queue, exchange, "#")


async def consume(channel: AbstractChannel, queue: str) -> None:
    await (await channel.get_underlay_channel()).basic_consume(queue, _keep([]))


def _keep(where: list[DeliveredMessage]) -> Callable[[DeliveredMessage], Coroutine[Any, Any, None]]:
    async def keep(message: DeliveredMessage) -> None:
        where.append(message)

    return keep


@contextlib.asynccontextmanager
async def channel_of(stack: GuardedStack, user: str) -> AsyncIterator[AbstractChannel]:
    async with await aio_pika.connect(stack.url(user)) as connection:
        yield await connection.channel()
