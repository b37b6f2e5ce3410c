"""A private MongoDB: a replica set with one member, its own data and port."""

import os
import subprocess
from pathlib import Path

from .mongod import find_mongod
from .paths import LocalError, command
from .ports import accepts_connections, is_free, remembered_ports
from .process import ManagedProcess


class MongoServer:
    """A server that keeps its state and port over stop, kill and start."""

    name = "mongodb"

    def __init__(self, base_dir: Path, log_dir: Path | None = None) -> None:
        self.base_dir = base_dir.resolve()
        logs = log_dir or self.base_dir / "logs"
        self.port = remembered_ports(self.base_dir / "ports.json", "mongo")["mongo"]
        self._process = ManagedProcess(self.name, self.base_dir, logs / "mongodb.log")

    @property
    def url(self) -> str:
        return f"mongodb://127.0.0.1:{self.port}/?directConnection=true"

    @property
    def pid(self) -> int | None:
        return self._process.pid

    @property
    def health(self) -> str:
        if self.pid is None:
            return "down"
        return "ok" if accepts_connections(self.port) else "not ready: no answer"

    def start(self, timeout: float = 60.0) -> None:
        """Start the server if it is not running, and wait until it accepts writes."""
        self.start_as_member(timeout)
        initiate_replica_set(self.url)

    def start_as_member(self, timeout: float = 60.0) -> None:
        """Start the server. It accepts writes only after its replica set has been initiated."""
        if self.pid is None:
            self._check_port()
            (self.base_dir / "data").mkdir(parents=True, exist_ok=True)
            self._process.start(self._arguments(), os.environ)
        self._process.wait_until_ready(lambda: accepts_connections(self.port), timeout)

    def stop(self) -> None:
        self._process.stop(grace=30)

    def kill(self) -> None:
        """Kill the server, as a power failure would."""
        self._process.kill()

    def restart(self) -> None:
        self.stop()
        self.start()

    def _check_port(self) -> None:
        if not is_free(self.port):
            raise LocalError(
                f"Another program has taken port {self.port} of the MongoDB in {self.base_dir}: "
                f"end it, or remove that directory to start afresh on another port."
            )

    def _arguments(self) -> list[str]:
        mongod = find_mongod()
        if mongod is None:
            raise LocalError("mongod is missing: run `deploy/local install`.")
        return [
            *(str(mongod), "--replSet", "rs0"),
            *("--dbpath", str(self.base_dir / "data")),
            *("--bind_ip", "127.0.0.1", "--port", str(self.port), "--nounixsocket"),
            # The default cache is half of the memory, but the machine is shared.
            *("--wiredTigerCacheSizeGB", "0.5"),
            "--quiet",
        ]


def initiate_replica_set(url: str, member: str | None = None) -> None:
    """Initiate the replica set, unless that has been done, and wait until it accepts writes.

    The member is the address of a single server as it finds itself, if that is not the one in the URL.
    """
    options = ["--member", member] if member else []
    arguments = [command("python"), "-m", "sublet_platform.mongo.replica_set", url, *options]
    done = subprocess.run(arguments, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=120)
    if done.returncode != 0:
        raise LocalError(f"The replica set at {url} could not be initiated: {done.stderr.strip()}")
