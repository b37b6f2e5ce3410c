"""The demo passes all its checks, and reports a missing broker."""

from __future__ import annotations

import pytest

from acceptance.demo import assert_all_checks_passed, run_demo
from acceptance.stack import Stack

pytestmark = pytest.mark.real


def test_all_checks_of_the_demo_pass(stack: Stack) -> None:
    metrics = {"SUBLET_SCHEDULER_METRICS_URLS": stack.the("scheduler").url("/metrics")}
    assert_all_checks_passed(run_demo(stack.variables | metrics))


def test_the_demo_reports_that_the_broker_does_not_answer() -> None:
    done = run_demo({"SUBLET_AMQP_URL": "amqp://guest:guest@127.0.0.1:1/"})
    assert done.returncode == 1
    assert "RabbitMQ does not answer" in done.stdout
