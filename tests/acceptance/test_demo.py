"""`deploy/local demo` shows what it says it shows."""

from __future__ import annotations

import pytest

from acceptance.demo import assert_all_came_true, play
from acceptance.stack import Stack

pytestmark = pytest.mark.real


def test_everything_in_the_demo_comes_true(stack: Stack) -> None:
    metrics = {"SUBLET_SCHEDULER_METRICS_URLS": stack.the("scheduler").url("/metrics")}
    assert_all_came_true(play(stack.variables | metrics))


def test_without_a_broker_the_demo_fails_and_says_so() -> None:
    done = play({"SUBLET_AMQP_URL": "amqp://guest:guest@127.0.0.1:1/"})
    assert done.returncode == 1
    assert "RabbitMQ does not answer" in done.stdout
