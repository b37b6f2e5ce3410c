"""Prometheus metrics of event-ingest."""

from __future__ import annotations

from prometheus_client import Counter, Gauge

from sublet_platform.metrics import ServiceMetrics


class IngestMetrics:
    def __init__(self, metrics: ServiceMetrics) -> None:
        registry = metrics.registry
        self.events = Counter("sublet_events", "Events received", ["outcome"], registry=registry)
        """outcome: ``stored``, ``duplicate`` or ``refused``."""
        self.matches = Counter("sublet_event_matches", "Waits and triggers that an event satisfied", registry=registry)
        self.subscriptions = Gauge(
            "sublet_subscriptions", "Stored subscriptions, each a wait for an event", registry=registry
        )
        self.expression_failures = Counter(
            "sublet_expression_failures", "Failed evaluations of expressions on event payloads", registry=registry
        )
