"""Servers and services together: up, down, status."""

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .mongo import MongoServer
from .paths import LOGS, STATE, LocalError, say
from .rabbit import RabbitServer
from .services import NAMES, Service


@dataclass(frozen=True)
class Addresses:
    """The addresses of the servers."""

    amqp_url: str
    mongo_url: str

    def environment(self, prefix: str = "SUBLET") -> dict[str, str]:
        return {f"{prefix}_AMQP_URL": self.amqp_url, f"{prefix}_MONGO_URL": self.mongo_url}


class Stack:
    """The servers and services of this checkout."""

    def __init__(self, base_dir: Path = STATE, log_dir: Path = LOGS) -> None:
        self._base_dir = base_dir
        self.rabbit = RabbitServer(base_dir / "rabbitmq", log_dir)
        self.mongo = MongoServer(base_dir / "mongodb", log_dir)
        self.services = [Service(name, base_dir / "services", log_dir) for name in NAMES]

    @property
    def addresses(self) -> Addresses:
        return Addresses(
            amqp_url=os.environ.get("SUBLET_AMQP_URL") or self.rabbit.url,
            mongo_url=os.environ.get("SUBLET_MONGO_URL") or self.mongo.url,
        )

    @property
    def own_rabbit(self) -> bool:
        """This stack starts the broker. False if SUBLET_AMQP_URL names another one."""
        return self.addresses.amqp_url == self.rabbit.url

    @property
    def own_mongo(self) -> bool:
        return self.addresses.mongo_url == self.mongo.url

    def up_servers(self) -> None:
        for server, own in self._servers:
            if own:
                say(f"{server.name} {'is starting' if server.pid is None else 'is running already'} at {server.url}")
                server.start()

    def up(self) -> None:
        self.up_servers()
        for service in self.services:
            service.start(self.addresses.environment())
        for service in self.services:
            service.wait_until_ready()
            say(f"{service.name} is ready at http://127.0.0.1:{service.port}")

    def down(self) -> None:
        for part in reversed(self._parts):
            if part.pid is not None:
                say(f"Stopping {part.name}")
            part.stop()
        _remove_orphans()

    def wipe(self) -> None:
        """Delete all data. The next start begins with empty servers."""
        for directory in (self.rabbit.base_dir, self.mongo.base_dir):
            shutil.rmtree(directory, ignore_errors=True)

    def status(self) -> list[tuple[str, str, str, str]]:
        """One row for each part: its name, process id, port and health."""
        foreign = {server.name for server, own in self._servers if not own}
        return [
            (part.name, str(part.pid or "-"), str(part.port if part.pid else "-"), part.health)
            if part.name not in foreign
            else (part.name, "-", "-", "elsewhere")
            for part in self._parts
        ]

    def metrics_url(self, service: str) -> str:
        """The metrics address of a running service."""
        (port,) = (each.port for each in self.services if each.name == service)
        return f"http://127.0.0.1:{port}/metrics"

    @property
    def _servers(self) -> list[tuple[RabbitServer | MongoServer, bool]]:
        return [(self.rabbit, self.own_rabbit), (self.mongo, self.own_mongo)]

    @property
    def _parts(self) -> list[RabbitServer | MongoServer | Service]:
        return [self.rabbit, self.mongo, *self.services]


@contextlib.contextmanager
def private_servers(base_dir: Path, log_dir: Path | None = None) -> Iterator[Addresses]:
    """A private broker and database, removed at the end of the block."""
    try:
        rabbit, mongo = _private(base_dir, log_dir)
        rabbit.start()
        mongo.start()
        yield Addresses(rabbit.url, mongo.url)
    finally:
        _remove_private_servers(base_dir)


@contextlib.contextmanager
def servers_for_tests() -> Iterator[Addresses]:
    """Private servers below the state directory, named after the process that needs them."""
    _remove_orphans()
    with private_servers(STATE / f"test-{os.getpid()}", LOGS / "test") as addresses:
        yield addresses


def _remove_orphans() -> None:
    """Stop the servers of test runs that were killed before they could stop them."""
    for base_dir in STATE.glob("test-*"):
        if not Path("/proc", base_dir.name.removeprefix("test-")).exists():
            say(f"Removing the servers that a killed test run left in {base_dir}")
            _remove_private_servers(base_dir)


def _remove_private_servers(base_dir: Path) -> None:
    for server in _private(base_dir):
        server.stop()
    shutil.rmtree(base_dir, ignore_errors=True)


def _private(base_dir: Path, log_dir: Path | None = None) -> tuple[RabbitServer, MongoServer]:
    return RabbitServer(base_dir / "rabbitmq", log_dir), MongoServer(base_dir / "mongodb", log_dir)


@contextlib.contextmanager
def exclusive_lock() -> Iterator[None]:
    """Serialize the commands that change the stack of a checkout."""
    STATE.mkdir(exist_ok=True)
    with (STATE / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("Waiting for another deploy/local command to finish")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def log_files(service: str | None) -> list[Path]:
    """The log files of one part, or of all."""
    files = sorted(LOGS.glob("*.log"))
    if service is None:
        return files
    chosen = [file for file in files if file.stem == service]
    if not chosen:
        known = ", ".join(file.stem for file in files) or "none yet"
        raise LocalError(f"There is no log of {service!r}. Logs: {known}.")
    return chosen
