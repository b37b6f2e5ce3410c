"""Prometheus metrics of the timer."""

from __future__ import annotations

from prometheus_client import Gauge, Histogram

from sublet_platform.metrics import LATENCY_BUCKETS_S, ServiceMetrics


class TimerMetrics:
    def __init__(self, metrics: ServiceMetrics) -> None:
        registry = metrics.registry
        self.pending = Gauge("sublet_timers_pending", "Stored timers", registry=registry)
        self.lag_seconds = Histogram(
            "sublet_timer_lag_seconds",
            "Time from when a timer is due until it has fired",
            buckets=LATENCY_BUCKETS_S,
            registry=registry,
        )
