"""RabbitMQ and MongoDB in containers, for machines with a Docker engine."""

import contextlib
import os
import secrets
from collections.abc import Iterator

import docker  # type: ignore[import-untyped]
from deploy.localstack.mongo import initiate_replica_set
from deploy.localstack.paths import LocalError
from deploy.localstack.ports import accepts_connections, speaks_amqp, wait_until
from testcontainers.core.config import testcontainers_config
from testcontainers.core.container import DockerContainer

RABBITMQ_IMAGE = os.environ.get("RABBITMQ_IMAGE", "rabbitmq:4-management")
MONGO_IMAGE = os.environ.get("MONGO_IMAGE", "mongo:7")
USER = "sublet"  # guest may connect from within its container only
START_SECONDS = 120


class ContainersUnavailable(Exception):
    """There is no Docker engine or image, or a container does not start."""


@contextlib.contextmanager
def container_servers() -> Iterator[tuple[str, str]]:
    """The AMQP and MongoDB addresses of two new containers, removed at the end of the block."""
    with contextlib.ExitStack() as stack:
        try:
            _do_without_absent_reaper()
            addresses = _start_rabbitmq(stack), _start_mongodb(stack)
        except (docker.errors.DockerException, OSError, LocalError) as error:
            raise ContainersUnavailable(str(error)) from error
        yield addresses


def _do_without_absent_reaper() -> None:
    """Disable the clean-up container if it is missing, because the tests can run without it."""
    engine = docker.from_env()
    try:
        engine.images.get(testcontainers_config.ryuk_image)
    except docker.errors.ImageNotFound:
        testcontainers_config.ryuk_disabled = True
    finally:
        engine.close()


def _start_rabbitmq(stack: contextlib.ExitStack) -> str:
    password = secrets.token_hex(16)
    broker = DockerContainer(RABBITMQ_IMAGE).with_exposed_ports(5672)
    broker.with_envs(RABBITMQ_DEFAULT_USER=USER, RABBITMQ_DEFAULT_PASS=password)
    stack.enter_context(broker)
    host, port = broker.get_container_host_ip(), int(broker.get_exposed_port(5672))
    wait_until(lambda: speaks_amqp(host, port), START_SECONDS, f"{RABBITMQ_IMAGE} did not answer")
    return f"amqp://{USER}:{password}@{host}:{port}/"


def _start_mongodb(stack: contextlib.ExitStack) -> str:
    # The member of a replica set must find itself at the address it was given: within its container.
    database = DockerContainer(MONGO_IMAGE).with_exposed_ports(27017)
    database.with_command("mongod --replSet rs0 --bind_ip_all")
    stack.enter_context(database)
    host, port = database.get_container_host_ip(), int(database.get_exposed_port(27017))
    wait_until(lambda: accepts_connections(port, host), START_SECONDS, f"{MONGO_IMAGE} did not answer")
    url = f"mongodb://{host}:{port}/?directConnection=true"
    initiate_replica_set(url, member="127.0.0.1:27017")
    return url
