"""A Prometheus, and the expressions that the dashboard asks it."""

from __future__ import annotations

import asyncio
import json
import math
import re
import time
import urllib.error
import urllib.parse
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from pathlib import Path

from deploy.localstack.paths import ROOT
from deploy.localstack.ports import choose_ports, wait_until
from deploy.localstack.process import ManagedProcess

from acceptance.environment import eventually
from acceptance.processes import DIRECT, READY_TIMEOUT_S

DASHBOARD = Path(ROOT, "deploy/grafana/dashboards/sublet.json")
QUERY_STEP_S = 1
METRIC = re.compile(r"\b(?:sublet|rabbitmq)_[a-z_]+")

OF_THE_BROKER = {"rabbitmq_detailed_queue_messages_ready", "rabbitmq_detailed_queue_messages_unacked"}
"""Its own plugin counts these."""
ONLY_IN_TROUBLE = {
    "sublet_messages_dead_lettered_total",
    "sublet_sweeper_anomalies_total",
    "sublet_task_failures_total",
}
"""Counters with labels, which do not show before the first time."""


def expressions() -> list[str]:
    """As they stand in the dashboard."""
    panels = json.loads(DASHBOARD.read_text())["panels"]
    return [target["expr"] for panel in panels for target in panel.get("targets", ())]


def metrics_of(expression: str) -> set[str]:
    return set(METRIC.findall(expression))


class Prometheus:
    """One that runs somewhere."""

    def __init__(self, url: str) -> None:
        self.url = url

    @property
    def ready(self) -> bool:
        try:
            with DIRECT.open(f"{self.url}/-/ready", timeout=5) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def draws(self, expression: str, since: float, rate_interval: str) -> bool:
        """Whether a panel with this expression shows anything at all for the time since then.

        Raises:
            AssertionError: Prometheus refuses the expression.
        """
        asked = expression.replace("$__rate_interval", rate_interval).replace("$pool", ".*")
        parameters = {"query": asked, "start": since, "end": time.time(), "step": QUERY_STEP_S}
        try:
            with DIRECT.open(f"{self.url}/api/v1/query_range?{urllib.parse.urlencode(parameters)}") as answer:
                series = json.load(answer)["data"]["result"]
        except urllib.error.HTTPError as error:
            with error:
                raise AssertionError(f"{asked}: {error.read().decode()}") from None
        return any(math.isfinite(float(value)) for each in series for _, value in each["values"])


class OwnPrometheus(Prometheus):
    """One of this test's, which scrapes these addresses (host:port) every second."""

    def __init__(self, program: str, directory: Path, targets: Sequence[str]) -> None:
        address = f"127.0.0.1:{choose_ports('http')['http']}"
        super().__init__(f"http://{address}")
        self._targets = len(targets)
        settings = directory / "prometheus.json"  # JSON is YAML
        job = {"job_name": "sublet", "static_configs": [{"targets": list(targets)}]}
        settings.write_text(json.dumps({"global": {"scrape_interval": "1s"}, "scrape_configs": [job]}))
        self._process = ManagedProcess("prometheus", directory, directory / "prometheus.log")
        self._arguments = [
            program,
            f"--config.file={settings}",
            f"--storage.tsdb.path={directory / 'prometheus'}",
            f"--web.listen-address={address}",
        ]

    def start(self) -> None:
        """Returns when every target has been scraped, so that whatever happens from now on is seen as a change."""
        since = time.time()
        self._process.start(self._arguments, {})
        self._process.wait_until_ready(lambda: self.ready, READY_TIMEOUT_S)
        scraped = f"count(up == 1) == {self._targets}"
        wait_until(lambda: self.draws(scraped, since, "15s"), READY_TIMEOUT_S, "Prometheus did not reach every target")

    def stop(self) -> None:
        self._process.stop()


async def every_panel_draws(prometheus: Prometheus, since: float, rate_interval: str, without: set[str]) -> None:
    """Fails if one stays empty, but for those about these metrics: they need only be understood."""
    for expression in expressions():
        draws: Callable[[], Awaitable[bool]] = partial(
            asyncio.to_thread, prometheus.draws, expression, since, rate_interval
        )
        if metrics_of(expression) & without:
            await draws()
        else:
            await eventually(draws, f"{expression} draws something")
