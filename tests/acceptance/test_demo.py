"""`deploy/local demo` shows what it says it shows."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from deploy.localstack.places import ROOT, command

from acceptance.stack import Stack

pytestmark = pytest.mark.real

PATIENCE_S = 240.0


def test_everything_in_the_demo_comes_true(stack: Stack) -> None:
    metrics = {"SUBLET_SCHEDULER_METRICS_URLS": stack.the("scheduler").url("/metrics")}
    done = play(stack.environment | metrics)
    assert done.returncode == 0, done.stdout
    assert "Everything came true." in done.stdout
    assert "✗" not in done.stdout


def test_without_a_broker_the_demo_fails_and_says_so() -> None:
    done = play({"SUBLET_AMQP_URL": "amqp://guest:guest@127.0.0.1:1/"})
    assert done.returncode == 1
    assert "RabbitMQ does not answer" in done.stdout


def play(environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [command("python"), str(Path(ROOT, "deploy/demo/run.py"))],
        env=os.environ | environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
