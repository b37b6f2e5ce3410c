"""Free ports. They are stored, so that a restarted server has the same port."""

import json
import random
import socket
import time
from collections.abc import Callable
from pathlib import Path

from .paths import LocalError

# These are below the range that Linux uses for outgoing connections. A port of that range may be taken when its server
# restarts.
CANDIDATES = range(20_000, 32_000)


def choose_ports(*names: str) -> dict[str, int]:
    """A free port for every name."""
    free = (port for port in random.sample(CANDIDATES, len(CANDIDATES)) if is_free(port))
    return dict(zip(names, free, strict=False))


def remembered_ports(file: Path, *names: str) -> dict[str, int]:
    """The ports that the file contains. If it does not exist, it is created with free ports."""
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(choose_ports(*names)))
    ports: dict[str, int] = json.loads(file.read_text())
    return ports


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def accepts_connections(port: int, host: str = "127.0.0.1") -> bool:
    try:
        socket.create_connection((host, port), timeout=1).close()
    except OSError:
        return False
    return True


def speaks_amqp(host: str, port: int) -> bool:
    """Whether a broker answers the AMQP 0-9-1 greeting. A port alone may be open long before that."""
    try:
        with socket.create_connection((host, port), timeout=2) as connection:
            connection.sendall(b"AMQP\x00\x00\x09\x01")
            method_frame = b"\x01"
            return connection.recv(1) == method_frame
    except OSError:
        return False


def wait_until(ready: Callable[[], bool], seconds: float, what: str) -> None:
    """Ask again until the answer is yes."""
    deadline = time.monotonic() + seconds
    pause = 0.05
    while not ready():
        if time.monotonic() > deadline:
            raise LocalError(f"{what} within {seconds:.0f} s.")
        time.sleep(pause)
        pause = min(pause * 1.5, 0.5)
