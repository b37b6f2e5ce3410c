"""Processes started as users start them: a command, settings in the environment, signals by process id."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from deploy.localstack.paths import ROOT
from deploy.localstack.ports import choose_ports, wait_until
from prometheus_client.parser import text_string_to_metric_families

from support import servers  # noqa: F401  # it makes `deploy` importable

READY_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 30.0
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class Process:
    """One service or worker. Its log goes on over restarts; its HTTP port stays the same."""

    def __init__(self, name: str, arguments: list[str], variables: Mapping[str, str], log: Path) -> None:
        self.name = name
        self.log = log
        self._arguments = arguments
        self._port = choose_ports("http")["http"]
        http = {"SUBLET_HTTP_HOST": "127.0.0.1", "SUBLET_HTTP_PORT": str(self._port)}
        self._environment = {**os.environ, **variables, **http}
        self._child: subprocess.Popen[bytes] | None = None

    def __repr__(self) -> str:
        return f"<{self.name}>"

    # --- life -------------------------------------------------------------------------------------------------

    def start(self) -> None:
        assert not self.running, f"{self.name} runs already"
        # Should the tests be killed, the kernel ends what they have started.
        guard = ["setpriv", "--pdeathsig", "KILL"] if shutil.which("setpriv") else []
        with self.log.open("ab") as log:
            self._child = subprocess.Popen(
                [*guard, *self._arguments],
                env=self._environment,
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def running(self) -> bool:
        return self._child is not None and self._child.poll() is None

    @property
    def pid(self) -> int:
        assert self._child is not None, f"{self.name} was never started"
        return self._child.pid

    def kill(self) -> None:
        """kill -9: no chance to say goodbye."""
        self._signal(signal.SIGKILL)
        self.wait_for_end()

    def terminate(self) -> None:
        """SIGTERM; see `wait_for_end`."""
        self._signal(signal.SIGTERM)

    def pause(self) -> None:
        """SIGSTOP: alive, but does nothing."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def wait_for_end(self, timeout_s: float = STOP_TIMEOUT_S) -> int:
        """The exit status."""
        assert self._child is not None
        return self._child.wait(timeout_s)

    def stop(self, grace_s: float = STOP_TIMEOUT_S) -> None:
        """As `terminate`; what does not end in time is killed."""
        if not self.running:
            return
        self.resume()
        self.terminate()
        try:
            self.wait_for_end(grace_s)
        except subprocess.TimeoutExpired:
            self.kill()

    def _signal(self, number: signal.Signals) -> None:
        assert self._child is not None
        self._child.send_signal(number)

    # --- what it says -----------------------------------------------------------------------------------------

    def wait_until_ready(self) -> None:
        wait_until(lambda: not self.running or self.ready, READY_TIMEOUT_S, f"{self.name} did not become ready")
        assert self.running, f"{self.name} ended while it started:\n{self.last_words()}"

    @property
    def ready(self) -> bool:
        return self._ask("/health")[0] == 200

    def health(self) -> dict[str, Any]:
        """What ``/health`` says; empty if nobody answers."""
        _, body = self._ask("/health")
        said: dict[str, Any] = json.loads(body) if body else {}
        return said

    def metric(self, name: str, **labels: str) -> float:
        """The sum of all samples of this name that have these labels; 0 if nobody answers."""
        return sum(value for found, value in self._samples(name) if labels.items() <= found.items())

    def metric_by(self, label: str, name: str) -> Counter[str]:
        """The samples of this name, by the value of this label; empty if nobody answers."""
        return Counter({labels[label]: int(value) for labels, value in self._samples(name)})

    def _samples(self, name: str) -> Iterator[tuple[Mapping[str, str], float]]:
        for family in text_string_to_metric_families(self.metrics()):
            for sample in family.samples:
                if sample.name == name:
                    yield sample.labels, sample.value

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self._port}{path}"

    def metrics(self) -> str:
        """What ``/metrics`` says; empty if nobody answers."""
        return self._ask("/metrics")[1]

    def _ask(self, path: str) -> tuple[int, str]:
        try:
            with DIRECT.open(self.url(path), timeout=5) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()
        except OSError:
            return 0, ""

    def last_words(self, lines: int = 40) -> str:
        text = self.log.read_text(errors="replace") if self.log.exists() else ""
        return "\n".join([f"--- the end of {self.log} ---", *text.splitlines()[-lines:]])
