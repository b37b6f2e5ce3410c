"""Every metric and label that the dashboard queries exists after the system has done some work."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from acceptance.environment import Environment
from acceptance.prometheus import (
    OF_THE_BROKER,
    ONLY_IN_TROUBLE,
    OwnPrometheus,
    every_panel_draws,
    expressions,
    metrics_of,
)
from acceptance.stack import SERVICES, Stack

pytestmark = pytest.mark.real

GROUPED = re.compile(r"by \(([^)]+)\) \((?:rate|increase)?\(?(sublet_[a-z_]+)")


async def test_the_services_show_what_the_dashboard_asks_for(environment: Environment, stack: Stack) -> None:
    await environment.worker("double", slots=1)
    await environment.workflows.double.aio_run(environment.workflows.Number(n=1))
    await environment.publish_event("seen.by.nobody", b"{}")
    shown = labels_by_name(stack)
    for expression in expressions():
        for name in metrics_of(expression) - ONLY_IN_TROUBLE - OF_THE_BROKER:
            assert name in shown, expression
        for labels, name in GROUPED.findall(expression):
            if name not in ONLY_IN_TROUBLE:
                assert set(labels.split(", ")) - {"instance"} <= shown[name], expression


@pytest.fixture
def prometheus(stack: Stack, tmp_path: Path) -> Iterator[OwnPrometheus]:
    program = shutil.which("prometheus")
    assert program is not None
    targets = [stack.the(service).url("").removeprefix("http://") for service in SERVICES]
    own = OwnPrometheus(program, tmp_path, targets)
    try:
        own.start()
        yield own
    finally:
        own.stop()


@pytest.mark.tries("prometheus")
async def test_prometheus_has_something_to_draw_in_every_panel(
    environment: Environment, prometheus: OwnPrometheus
) -> None:
    since = time.time()
    await environment.worker("durable_dag", "await_payment", "double", slots=1, durable_slots=1)
    payment = await environment.workflows.await_payment.aio_run(
        environment.workflows.Number(n=1), wait_for_result=False
    )
    await environment.until_evicted(payment.workflow_run_id)
    await environment.publish_event("paid", b'{"order": 1, "amount": 2}')
    await payment.aio_result()
    await environment.workflows.durable_dag.aio_run(environment.workflows.Number(n=1))
    await every_panel_draws(prometheus, since, "15s", without=ONLY_IN_TROUBLE | OF_THE_BROKER)


def labels_by_name(stack: Stack) -> dict[str, set[str]]:
    """The label names of each sample of each service."""
    shown: dict[str, set[str]] = {}
    for service in SERVICES:
        for family in text_string_to_metric_families(stack.the(service).metrics()):
            for sample in family.samples:
                shown.setdefault(sample.name, set()).update(sample.labels)
    return shown
