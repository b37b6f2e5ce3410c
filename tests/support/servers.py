"""Finds or starts a RabbitMQ and a MongoDB for the tests.

`find_servers` looks, in this order, for addresses in the environment, a Docker engine, and programs installed
on this machine. `RabbitServer` and `MongoServer` are for tests that stop, kill and restart a server.
"""

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# Tests are not installed, and neither is `deploy`, which knows how to run the servers without Docker.
sys.path.append(str(Path(__file__).resolve().parents[2]))

from deploy.localstack.mongo import MongoServer
from deploy.localstack.paths import LocalError
from deploy.localstack.rabbit import RabbitServer
from deploy.localstack.stack import private_servers

__all__ = ["LocalError", "MongoServer", "RabbitServer", "Servers", "ServersUnavailable", "find_servers"]


class ServersUnavailable(Exception):
    """There are no servers for the tests. The text has what was tried."""


@dataclass(frozen=True)
class Servers:
    """The addresses of the servers."""

    amqp_url: str
    mongo_url: str


@contextlib.contextmanager
def find_servers() -> Iterator[Servers]:
    """Servers from the first source that has them. Those that were started stop at the end of the block."""
    amqp_url, mongo_url = (os.environ.get(f"SUBLET_TEST_{name}_URL") for name in ("AMQP", "MONGO"))
    if amqp_url and mongo_url:
        yield Servers(amqp_url, mongo_url)
        return
    with contextlib.ExitStack() as stack:
        yield _start_servers(stack)


def _start_servers(stack: contextlib.ExitStack) -> Servers:
    # Imported here: no other test needs a client for Docker.
    from support.containers import ContainersUnavailable, container_servers

    try:
        return Servers(*stack.enter_context(container_servers()))
    except ContainersUnavailable as error:
        no_containers = str(error)
    directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sublet-test-")))
    try:
        addresses = stack.enter_context(private_servers(directory))
    except LocalError as error:
        raise ServersUnavailable(
            "There is no RabbitMQ and MongoDB to test against. "
            "SUBLET_TEST_AMQP_URL and SUBLET_TEST_MONGO_URL are not both set; "
            f"containers: {no_containers}; programs of this machine: {error}"
        ) from error
    return Servers(addresses.amqp_url, addresses.mongo_url)
