"""The dashboard queries only metrics that the services have."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from sublet_event_ingest.metrics import IngestMetrics
from sublet_platform.metrics import ServiceMetrics
from sublet_scheduler.metrics import SchedulerMetrics
from sublet_timer.metrics import TimerMetrics

DASHBOARDS = sorted((Path(__file__).resolve().parents[3] / "deploy/grafana/dashboards").glob("*.json"))
DATASOURCE = "sublet-prometheus"

NAME = re.compile(r"\b(?:sublet|rabbitmq|process|python)_[a-z0-9_]+|\bup\b")
FOREIGN = re.compile(r"up|rabbitmq_detailed_queue_messages_(?:ready|unacked)")
"""Metrics of Prometheus itself and of the broker's plugin."""

SUFFIXES = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count"), "gauge": ("",)}


def test_there_is_a_dashboard() -> None:
    assert DASHBOARDS


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_every_expression_is_about_metrics_of_the_services(path: Path) -> None:
    known = registered_names()
    asked = {name for expression in expressions(path) for name in NAME.findall(expression)}
    assert asked
    assert {name for name in asked if not FOREIGN.fullmatch(name)} - known == set()


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_every_expression_names_a_metric(path: Path) -> None:
    assert [expression for expression in expressions(path) if not NAME.search(expression)] == []


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_every_panel_asks_the_provisioned_datasource(path: Path) -> None:
    sources = {panel["datasource"]["uid"] for panel in panels(path) if panel["type"] != "row"}
    assert sources == {DATASOURCE}


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_panels_do_not_overlap(path: Path) -> None:
    cells = [
        (x, y)
        for panel in panels(path)
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) < 24


def panels(path: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(path.read_text())["panels"]
    return found


def expressions(path: Path) -> Iterator[str]:
    for panel in panels(path):
        for target in panel.get("targets", ()):
            yield target["expr"]


def registered_names() -> set[str]:
    """The metric names of all services, as Prometheus sees them."""
    registry = CollectorRegistry()
    metrics = ServiceMetrics(registry)
    SchedulerMetrics(metrics)
    TimerMetrics(metrics)
    IngestMetrics(metrics)
    return {family.name + suffix for family in registry.collect() for suffix in SUFFIXES[family.type]}
