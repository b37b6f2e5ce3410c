"""A node of a RabbitMQ cluster dies, or a member of a MongoDB replica set: the others carry on, and nothing is lost."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from acceptance.environment import Environment, eventually
from acceptance.stack import ClusterStack, Stack
from chaos.fault_tests import assert_load_survives
from contract.adapters import Inbox
from sublet._amqp.adapter import AmqpTransport
from sublet_platform.rabbit.broker import Rabbit, declare
from sublet_protocol.topology import Queue, Topology
from support.clusters import SIZE, MongoReplicaSet, RabbitCluster

pytestmark = pytest.mark.real

LED = Queue("sublet.test.led", {"x-queue-type": "quorum", "x-queue-leader-locator": "client-local"})
"""By the node on which it is declared."""


@pytest.fixture(scope="module")
def replica_set(tmp_path_factory: pytest.TempPathFactory) -> MongoReplicaSet:
    return MongoReplicaSet(tmp_path_factory.mktemp("members"))


@pytest.fixture(scope="module")
def stack(
    stack: Stack, replica_set: MongoReplicaSet, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ClusterStack]:
    """In the place of the shared one, which would not be there if this one could not be."""
    directory = tmp_path_factory.mktemp("clustered")
    clustered = ClusterStack(directory, RabbitCluster(directory), replica_set)
    try:
        clustered.start()
        yield clustered
    finally:
        clustered.stop()


@pytest.fixture
def cluster(stack: ClusterStack, replica_set: MongoReplicaSet) -> Iterator[RabbitCluster]:
    """All of it running again after the test, like the replica set."""
    yield stack.cluster
    stack.cluster.start()
    replica_set.start()


async def test_every_queue_that_must_outlive_its_node_is_on_all_of_them(
    environment: Environment, cluster: RabbitCluster
) -> None:
    await environment.worker("double", slots=1)
    await environment.workflows.double.aio_run(environment.workflows.Number(n=1))
    members = await asyncio.to_thread(cluster.members)
    assert {len(nodes) for nodes in members.values()} == {SIZE}
    for name in ("shard.0", "timers", "ingest", "dead", "queries", "pool."):
        assert any(queue.startswith(f"sublet.{name}") for queue in members), f"{name} is a quorum queue"


async def test_runs_end_without_the_node_that_led_most_queues(environment: Environment, cluster: RabbitCluster) -> None:
    leader = await asyncio.to_thread(cluster.leader)
    await assert_load_survives(environment, "rabbitmq", leader.kill)


async def test_runs_end_without_the_node_to_which_everybody_was_connected(
    environment: Environment, cluster: RabbitCluster
) -> None:
    host = await asyncio.to_thread(cluster.host)
    await assert_load_survives(environment, "rabbitmq", host.kill)


async def test_hints_of_a_worker_that_began_while_a_leader_was_dead_arrive(cluster: RabbitCluster) -> None:
    leader, *others = cluster.nodes
    host = others[0].url
    await declare(leader.url, Topology((), (LED,), ()))
    watcher = Rabbit(host)
    await watcher.open()
    inbox = Inbox()
    await watcher.consume(LED.name, inbox, prefetch=65_535)
    workers = [AmqpTransport(host) for _ in range(50)]
    for worker in workers:
        await worker.connect()
    death = asyncio.create_task(asyncio.to_thread(leader.kill))
    for number, worker in enumerate(workers):
        await asyncio.sleep(0.02)
        worker.publish_nowait("", LED.name, str(number).encode())
    await death

    async def everybody_is_heard() -> bool:
        inbox.clear()
        for number, worker in enumerate(workers):
            worker.publish_nowait("", LED.name, str(number).encode())
        await asyncio.sleep(1.0)
        return len(set(inbox.bodies)) == len(workers)

    await eventually(everybody_is_heard, "a hint of each")
    for worker in workers:
        await worker.close()
    await watcher.close()


@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize("how", ["by a power cut", "in good order"])
async def test_runs_end_when_another_member_takes_the_writes(
    environment: Environment, replica_set: MongoReplicaSet, how: str
) -> None:
    primary = await asyncio.to_thread(replica_set.primary)
    await assert_load_survives(
        environment, "mongodb", primary.kill if how == "by a power cut" else replica_set.step_down
    )
    assert await asyncio.to_thread(replica_set.primary) is not primary
