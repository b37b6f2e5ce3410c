"""The services of Sublet as processes on this machine."""

import contextlib
import json
import os
import urllib.error
import urllib.request
from pathlib import Path

from .paths import command
from .ports import choose_ports
from .process import ManagedProcess

NAMES = ("scheduler", "timer", "event-ingest")
# Requests to this machine bypass a proxy that the environment names.
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class Service:
    """One service. Its HTTP port is chosen at each start."""

    def __init__(self, name: str, base_dir: Path, log_dir: Path) -> None:
        self.name = name
        self._port_file = base_dir / f"{name}.json"
        self._process = ManagedProcess(name, base_dir, log_dir / f"{name}.log")

    @property
    def pid(self) -> int | None:
        return self._process.pid

    @property
    def port(self) -> int | None:
        if self.pid is None:
            return None
        port: int = json.loads(self._port_file.read_text())["http"]
        return port

    @property
    def health(self) -> str:
        if self.pid is None:
            return "down"
        status, body = self._ask_health()
        return "ok" if status == 200 else f"not ready: {body or 'no answer'}"

    def start(self, addresses: dict[str, str]) -> None:
        """Start the service if it is not running."""
        if self.pid is not None:
            return
        ports = choose_ports("http")
        self._port_file.parent.mkdir(parents=True, exist_ok=True)
        self._port_file.write_text(json.dumps(ports))
        settings = {"SUBLET_HTTP_HOST": "127.0.0.1", "SUBLET_HTTP_PORT": str(ports["http"])}
        self._process.start([command(f"sublet-{self.name}")], os.environ | addresses | settings)

    def wait_until_ready(self, timeout: float = 60.0) -> None:
        """Wait until the service reports that it is ready."""
        self._process.wait_until_ready(lambda: self.health == "ok", timeout)

    def stop(self) -> None:
        self._process.stop()

    def _ask_health(self) -> tuple[int, str]:
        """The HTTP status of /health (0: no answer) and its text."""
        try:
            with DIRECT.open(f"http://127.0.0.1:{self.port}/health", timeout=2) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            with contextlib.closing(error):
                return error.code, error.read().decode()
        except OSError:
            return 0, ""
