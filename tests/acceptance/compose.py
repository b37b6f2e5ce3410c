"""`docker-compose.yml`, with passwords, ports and volumes of its own."""

from __future__ import annotations

import json
import os
import re
import secrets
import subprocess
from pathlib import Path
from typing import Any

from deploy.localstack.paths import ROOT
from deploy.localstack.ports import choose_ports

PROJECT = "sublet-test"
PORTS = ("AMQP_PORT", "RABBITMQ_UI_PORT", "PROMETHEUS_PORT", "GRAFANA_PORT")


class Compose:
    """``services``: all services, or all except Grafana if its image is missing and cannot be pulled."""

    def __init__(self) -> None:
        self._ports = choose_ports(*PORTS)
        passwords = set(re.findall(r"\w+_PASSWORD(?=:)", Path(ROOT, "docker-compose.yml").read_text()))
        self._passwords = {name: secrets.token_hex() for name in passwords}
        self.services = self.do("config", "--services").split()
        if self._run("pull", "--quiet", "--policy", "missing", "grafana").returncode != 0:
            self.services.remove("grafana")

    def up(self, *options: str) -> None:
        self.do("up", "--wait", *options, *self.services)

    def do(self, *arguments: str) -> str:
        """The output of ``docker compose``.

        Raises:
            AssertionError: it failed.
        """
        done = self._run(*arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def states(self, service: str) -> list[str]:
        """The state of each of its containers, for example ``running``."""
        lines = self.do("ps", "--all", "--format", "json", service).splitlines()
        containers: list[dict[str, Any]] = [json.loads(line) for line in lines]
        return [container["State"] for container in containers]

    def amqp_url(self, user: str) -> str:
        password = self._passwords[f"RABBITMQ_{user.removeprefix('sublet-').upper()}_PASSWORD"]
        return f"amqp://{user}:{password}@127.0.0.1:{self._ports['AMQP_PORT']}/"

    @property
    def prometheus_url(self) -> str:
        return f"http://127.0.0.1:{self._ports['PROMETHEUS_PORT']}"

    def _run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        settings = self._passwords | {name: str(port) for name, port in self._ports.items()}
        return subprocess.run(
            ["docker", "compose", "--project-name", PROJECT, *arguments],
            cwd=ROOT,
            env=os.environ | settings,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )


def kill(*containers: str) -> None:
    """Kill containers (kill -9). Docker treats this as a manual stop: they stay down until the next ``up``."""
    subprocess.run(["docker", "kill", *(f"{PROJECT}-{name}" for name in containers)], check=True, capture_output=True)
