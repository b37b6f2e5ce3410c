"""The network between the nodes of a RabbitMQ cluster breaks: the majority carries on, and nothing happens twice."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import pytest

from acceptance.environment import Environment, eventually
from acceptance.stack import ClusterStack, Stack
from chaos.fault_tests import assert_load_survives
from support.clusters import RabbitCluster
from support.network_namespaces import Networks

pytestmark = [pytest.mark.real, pytest.mark.tries("netns")]


@pytest.fixture(scope="module")
def networks() -> Iterator[Networks]:
    networks = Networks()
    try:
        networks.make()
        yield networks
    finally:
        networks.remove()


@pytest.fixture(scope="module")
def stack(stack: Stack, networks: Networks, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClusterStack]:
    """In the place of the shared one, which would not be there if this one could not be."""
    directory = tmp_path_factory.mktemp("parted")
    parted = ClusterStack(directory, RabbitCluster(directory, networks.nodes))
    try:
        parted.start()
        yield parted
    finally:
        parted.stop()


async def test_runs_end_on_the_side_of_the_majority(
    environment: Environment, stack: ClusterStack, networks: Networks
) -> None:
    """Everybody is connected to the node that is cut off. Clients reach it all the while, so it must send them away."""
    cluster = stack.cluster
    (alone,) = (place for place, node in enumerate(cluster.nodes) if node is cluster.host())
    try:
        await assert_load_survives(environment, "rabbitmq", partial(networks.cut, alone))
    finally:
        networks.mend(alone)
    await eventually(lambda: all(node.health == "ok" for node in cluster.nodes), "the one that was cut off is back")
