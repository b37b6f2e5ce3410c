"""Three RabbitMQ nodes and three MongoDB members: processes on this machine that a test may kill."""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from deploy.localstack.mongo import initiate_replica_set
from deploy.localstack.ports import choose_ports
from deploy.localstack.rabbit import Node, PortMapper
from pymongo import MongoClient

from support.servers import MongoServer, RabbitServer

SIZE = 3
VHOST = "sublet"


class RabbitCluster:
    """A cluster of three nodes. They know each other before the start, and join automatically."""

    def __init__(self, directory: Path, nodes: Sequence[Node] = ()) -> None:
        """Without ``nodes``, all nodes have the address of this machine."""
        nodes = nodes or [Node(name=f"sublet-{place}") for place in range(SIZE)]
        port = choose_ports("epmd")["epmd"]
        self._mappers = {
            node.address: PortMapper(port, directory / node.address, directory / node.address, node) for node in nodes
        }
        self.nodes = [
            RabbitServer(directory / node.name, node=node, mapper=self._mappers[node.address])
            for node in with_peers(nodes)
        ]
        share_cookie(self.nodes)

    @property
    def url(self) -> str:
        return ",".join(node.url for node in self.nodes)

    def start(self) -> None:
        """Start the processes that are not running."""
        for mapper in self._mappers.values():
            mapper.start()
        in_parallel([node.start for node in self.nodes])

    def create_vhost(self) -> None:
        """Create the virtual host of the URL. Its queues are quorum queues."""
        self.nodes[0].ctl("add_vhost", VHOST, "--default-queue-type", "quorum")
        self.nodes[0].ctl("set_permissions", "-p", VHOST, "guest", ".*", ".*", ".*")

    def stop(self) -> None:
        """Kill all processes. Their data is not needed any more."""
        in_parallel([node.kill for node in self.nodes])
        for mapper in self._mappers.values():
            mapper.stop()

    @property
    def live_node(self) -> RabbitServer:
        """A node that answers. A node without a majority is running, but does not answer."""
        return next(node for node in self.nodes if node.health == "ok")

    def members(self) -> dict[str, list[str]]:
        """The nodes that hold a copy of each quorum queue."""
        rows = self._list("list_queues", "name", "type", "members")
        return {name: members.strip("[]").split(", ") for name, type_, members in rows if type_ == "quorum"}

    def leader(self) -> RabbitServer:
        """The node that leads most queues."""
        leaders = Counter(leader for (leader,) in self._list("list_queues", "leader"))
        (name, _), *_ = leaders.most_common()
        return next(node for node in self.nodes if node.node.full_name == name)

    def host(self) -> RabbitServer:
        """The node to which most clients are connected."""
        ports = Counter(port for (port,) in self._list("list_connections", "port"))
        (port, _), *_ = ports.most_common()
        return next(node for node in self.nodes if str(node.port) == port)

    def _list(self, what: str, *columns: str) -> list[list[str]]:
        vhost = [] if what == "list_connections" else ["-p", VHOST]
        lines = self.live_node.ctl(what, *vhost, "--no-table-headers", *columns).splitlines()
        return [line.split("\t") for line in lines if line]


class MongoReplicaSet:
    """A replica set of three members."""

    def __init__(self, directory: Path) -> None:
        self.members = [MongoServer(directory / f"mongodb-{number}") for number in range(SIZE)]

    @property
    def url(self) -> str:
        hosts = ",".join(f"127.0.0.1:{member.port}" for member in self.members)
        return f"mongodb://{hosts}/?replicaSet=rs0"

    def start(self) -> None:
        """Start the processes that are not running."""
        in_parallel([member.start_as_member for member in self.members])
        initiate_replica_set(self.url)

    def stop(self) -> None:
        """Kill all processes. Their data is not needed any more."""
        in_parallel([member.kill for member in self.members])

    def primary(self) -> MongoServer:
        """Wait for the member that accepts writes."""
        with MongoClient[Any](self.url) as client:
            client.admin.command("ping")
            assert client.primary is not None
            port = client.primary[1]
        return next(member for member in self.members if member.port == port)

    def step_down(self) -> None:
        """Make the primary step down and continue as a secondary."""
        with MongoClient[Any](self.url) as client:
            client.admin.command("replSetStepDown", 20)


def with_peers(nodes: Sequence[Node]) -> list[Node]:
    """The nodes with the settings of the cluster: their peers and the virtual host."""
    peers = "".join(
        f"cluster_formation.classic_config.nodes.{place} = {node.full_name}\n" for place, node in enumerate(nodes, 1)
    )
    settings = f"cluster_formation.peer_discovery_backend = classic_config\n{peers}"
    return [replace(node, settings=node.settings + settings, vhost=VHOST) for node in nodes]


def share_cookie(nodes: Sequence[RabbitServer]) -> None:
    """Give all nodes the same Erlang cookie, which they need to connect to each other."""
    secret = secrets.token_hex(16)
    for node in nodes:
        file = node.base_dir / ".erlang.cookie"
        file.write_text(secret)
        file.chmod(0o400)


def in_parallel(calls: Sequence[Callable[[], None]]) -> None:
    with ThreadPoolExecutor(len(calls)) as pool:
        for done in [pool.submit(call) for call in calls]:
            done.result()
