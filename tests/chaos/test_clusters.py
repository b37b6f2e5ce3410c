"""A RabbitMQ node or a MongoDB member of a cluster dies: the others continue, and nothing is lost."""

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
"""Its leader is the node on which it is declared."""


@pytest.fixture(scope="module")
def replica_set(tmp_path_factory: pytest.TempPathFactory) -> MongoReplicaSet:
    return MongoReplicaSet(tmp_path_factory.mktemp("members"))


@pytest.fixture(scope="module")
def stack(
    stack: Stack, replica_set: MongoReplicaSet, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ClusterStack]:
    """A clustered stack instead of the shared one. It depends on the shared one so that both are skipped alike."""
    directory = tmp_path_factory.mktemp("clustered")
    clustered = ClusterStack(directory, RabbitCluster(directory), replica_set)
    try:
        clustered.start()
        yield clustered
    finally:
        clustered.stop()


@pytest.fixture
def cluster(stack: ClusterStack, replica_set: MongoReplicaSet) -> Iterator[RabbitCluster]:
    """The cluster. After the test all its nodes and all members of the replica set run again."""
    yield stack.cluster
    stack.cluster.start()
    replica_set.start()


async def test_every_queue_that_must_survive_its_node_has_a_replica_on_all_nodes(
    environment: Environment, cluster: RabbitCluster
) -> None:
    await environment.worker("double", slots=1)
    await environment.workflows.double.aio_run(environment.workflows.Number(n=1))
    members = await asyncio.to_thread(cluster.members)
    assert {len(nodes) for nodes in members.values()} == {SIZE}
    for name in ("shard.0", "timers", "ingest", "dead", "queries", "pool."):
        assert any(queue.startswith(f"sublet.{name}") for queue in members), f"{name} is a quorum queue"


async def test_runs_complete_without_the_node_that_led_most_queues(
    environment: Environment, cluster: RabbitCluster
) -> None:
    leader = await asyncio.to_thread(cluster.leader)
    await assert_load_survives(environment, "rabbitmq", leader.kill)


async def test_runs_complete_without_the_node_that_had_most_clients(
    environment: Environment, cluster: RabbitCluster
) -> None:
    host = await asyncio.to_thread(cluster.host)
    await assert_load_survives(environment, "rabbitmq", host.kill)


async def test_unconfirmed_messages_of_workers_arrive_after_a_queue_leader_died(cluster: RabbitCluster) -> None:
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
    killing = asyncio.create_task(asyncio.to_thread(leader.kill))
    for number, worker in enumerate(workers):
        await asyncio.sleep(0.02)
        worker.publish_nowait("", LED.name, str(number).encode())
    await killing

    async def all_arrive() -> bool:
        inbox.clear()
        for number, worker in enumerate(workers):
            worker.publish_nowait("", LED.name, str(number).encode())
        await asyncio.sleep(1.0)
        return len(set(inbox.bodies)) == len(workers)

    await eventually(all_arrive, "a message of each worker arrives")
    for worker in workers:
        await worker.close()
    await watcher.close()


@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize("how", ["killed", "stepping down"])
async def test_runs_complete_when_another_member_becomes_primary(
    environment: Environment, replica_set: MongoReplicaSet, how: str
) -> None:
    primary = await asyncio.to_thread(replica_set.primary)
    await assert_load_survives(environment, "mongodb", primary.kill if how == "killed" else replica_set.step_down)
    assert await asyncio.to_thread(replica_set.primary) is not primary
