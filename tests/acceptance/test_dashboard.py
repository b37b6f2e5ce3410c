"""Every metric and label that the dashboard asks for is there once the system has done something."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from deploy.localstack.places import ROOT
from prometheus_client.parser import text_string_to_metric_families

from acceptance.lab import Lab
from acceptance.stack import SERVICES, Stack

pytestmark = pytest.mark.real

DASHBOARD = Path(ROOT, "deploy/grafana/dashboards/sublet.json")
METRIC = re.compile(r"\bsublet_[a-z_]+")
GROUPED = re.compile(r"by \(([^)]+)\) \((?:rate|increase)?\(?(sublet_[a-z_]+)")

ONLY_IN_TROUBLE = {
    "sublet_messages_dead_lettered_total",
    "sublet_sweeper_findings_total",
    "sublet_task_failures_total",
}
"""Counters with labels, which do not show before the first time."""


async def test_the_services_show_what_the_dashboard_asks_for(lab: Lab, stack: Stack) -> None:
    await lab.worker("double", slots=1)
    await lab.workflows.double.aio_run(lab.workflows.Number(n=1))
    await lab.publish_event("seen.by.nobody", b"{}")
    shown = labels_by_name(stack)
    for expression in expressions():
        for name in set(METRIC.findall(expression)) - ONLY_IN_TROUBLE:
            assert name in shown, expression
        for labels, name in GROUPED.findall(expression):
            if name not in ONLY_IN_TROUBLE:
                assert set(labels.split(", ")) - {"instance"} <= shown[name], expression


def expressions() -> list[str]:
    panels = json.loads(DASHBOARD.read_text())["panels"]
    return [target["expr"] for panel in panels for target in panel.get("targets", ())]


def labels_by_name(stack: Stack) -> dict[str, set[str]]:
    """The names of labels of each sample that some service shows."""
    shown: dict[str, set[str]] = {}
    for service in SERVICES:
        for family in text_string_to_metric_families(stack.the(service).metrics()):
            for sample in family.samples:
                shown.setdefault(sample.name, set()).update(sample.labels)
    return shown
