"""The network between the nodes of a RabbitMQ cluster breaks: the majority continues, and nothing happens twice."""

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
    """A clustered stack instead of the shared one. It depends on the shared one so that both are skipped alike."""
    directory = tmp_path_factory.mktemp("parted")
    parted = ClusterStack(directory, RabbitCluster(directory, networks.nodes))
    try:
        parted.start()
        yield parted
    finally:
        parted.stop()


async def test_runs_complete_on_the_side_of_the_majority(
    environment: Environment, stack: ClusterStack, networks: Networks
) -> None:
    """All clients are connected to the isolated node and can still reach it, so it must close their connections."""
    cluster = stack.cluster
    (isolated,) = (index for index, node in enumerate(cluster.nodes) if node is cluster.host())
    try:
        await assert_load_survives(environment, "rabbitmq", partial(networks.cut, isolated))
    finally:
        networks.mend(isolated)
    await eventually(lambda: all(node.health == "ok" for node in cluster.nodes), "the isolated node is back")
