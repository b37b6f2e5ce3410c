"""With the users of `deploy/rabbitmq/users.py` everybody can do their work, and nothing else."""

from __future__ import annotations

import contextlib
import json
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import aio_pika
import pytest
from aio_pika.abc import AbstractChannel
from aiormq.exceptions import ChannelAccessRefused
from deploy.rabbitmq.users import USERS

from acceptance.lab import Lab
from acceptance.processes import Process
from acceptance.stack import Stack
from sublet_platform.topology import topology

pytestmark = pytest.mark.real

SERVICE, WORKER, PUBLISHER = (user.name for user in USERS)
DECLARED = topology(shards=4)
EXCHANGES = {exchange.name for exchange in DECLARED.exchanges}
QUEUES = {queue.name for queue in DECLARED.queues}


class GuardedStack(Stack):
    """Services and workers come as users of their own. ``guest`` is left for the test to look with."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self._passwords = {user.name: secrets.token_hex() for user in USERS}

    def url(self, user: str) -> str:
        return f"amqp://{user}:{self._passwords[user]}@127.0.0.1:{self.rabbit.port}/"

    @property
    def environment(self) -> dict[str, str]:
        """That of workers and clients."""
        return {"SUBLET_AMQP_URL": self.url(WORKER)}

    def start_servers(self) -> None:
        super().start_servers()
        users = [{"name": name, "password": password, "tags": ""} for name, password in self._passwords.items()]
        permissions = [
            {"user": user.name, "vhost": "/", "configure": user.configure, "write": user.write, "read": user.read}
            for user in USERS
        ]
        definitions = self.directory / "users.json"
        definitions.write_text(json.dumps({"users": users, "permissions": permissions}))
        self.rabbit.ctl("import_definitions", str(definitions))

    def launch(self, service: str, environment: dict[str, str] | None = None) -> Process:
        addresses = {"SUBLET_AMQP_URL": self.url(SERVICE), "SUBLET_MONGO_URL": self.mongo.url}
        return super().launch(service, addresses | (environment or {}))


@pytest.fixture(scope="module")
def stack(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[GuardedStack]:
    """In the place of the shared one, which would not be there if this one could not be."""
    guarded = GuardedStack(tmp_path_factory.mktemp("guarded"))
    try:
        guarded.start()
        yield guarded
    finally:
        guarded.stop()


async def test_services_workers_clients_and_publishers_can_do_their_work(lab: Lab, stack: GuardedStack) -> None:
    """The services declare everything, the worker its queues and inbox; there are runs, children, waits and queries."""
    await lab.worker("voyage", "await_payment", "double", slots=1, durable_slots=1)
    voyage = await lab.workflows.voyage.aio_run(lab.workflows.Number(n=1))
    assert voyage["land"] == {"n": 2}
    waiting = await lab.workflows.await_payment.aio_run(lab.workflows.Number(n=7), wait_for_result=False)
    await lab.until_evicted(waiting.workflow_run_id)
    async with channel_of(stack, PUBLISHER) as channel:
        await publish(channel, "sublet.events", f"{lab.namespace}paid", b'{"order": 7, "amount": 1}')
    assert (await waiting.aio_result()).order == 7


async def test_a_publisher_may_publish_events_and_nothing_else(stack: GuardedStack) -> None:
    async with channel_of(stack, PUBLISHER) as channel:
        await publish(channel, "sublet.events", "seen.by.nobody", b"{}")
    for exchange in EXCHANGES - {"sublet.events"}:
        await refused(stack, PUBLISHER, publish, exchange, "slot.00")
    await may_not_touch_what_services_own(stack, PUBLISHER)
    for name in (None, "sublet.inbox.client.x", "sublet.pool.x.task", "my-own"):
        await refused(stack, PUBLISHER, declare, name)


async def test_a_worker_may_neither_read_nor_forge_what_services_tell_each_other(stack: GuardedStack) -> None:
    for exchange in ("sublet.notices", "sublet.dead"):
        await refused(stack, WORKER, publish, exchange, "")
    await may_not_touch_what_services_own(stack, WORKER)
    await refused(stack, WORKER, declare, "my-own")


async def may_not_touch_what_services_own(stack: GuardedStack, user: str) -> None:
    for queue in QUEUES:
        await refused(stack, user, publish, "", queue)
        await refused(stack, user, get, queue)
        await refused(stack, user, purge, queue)
        await refused(stack, user, delete, queue)
        await refused(stack, user, bind, queue, "sublet.requests")


async def refused(stack: GuardedStack, user: str, deed: Callable[..., Awaitable[None]], *names: str | None) -> None:
    async with channel_of(stack, user) as channel:
        with pytest.raises(ChannelAccessRefused):
            await deed(channel, *names)


async def publish(channel: AbstractChannel, exchange: str, routing_key: str, body: bytes = b"[]") -> None:
    where = await channel.get_exchange(exchange, ensure=False) if exchange else channel.default_exchange
    await where.publish(aio_pika.Message(body), routing_key, timeout=10)


async def declare(channel: AbstractChannel, queue: str | None) -> None:
    await channel.declare_queue(queue, exclusive=True)


async def delete(channel: AbstractChannel, queue: str) -> None:
    await channel.queue_delete(queue)


async def get(channel: AbstractChannel, queue: str) -> None:
    await (await channel.get_underlay_channel()).basic_get(queue)


async def purge(channel: AbstractChannel, queue: str) -> None:
    await (await channel.get_underlay_channel()).queue_purge(queue)


async def bind(channel: AbstractChannel, queue: str, exchange: str) -> None:
    await (await channel.get_underlay_channel()).queue_bind(queue, exchange, "#")


@contextlib.asynccontextmanager
async def channel_of(stack: GuardedStack, user: str) -> AsyncIterator[AbstractChannel]:
    async with await aio_pika.connect(stack.url(user)) as connection:
        yield await connection.channel()
