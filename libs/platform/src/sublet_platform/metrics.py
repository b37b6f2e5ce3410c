"""Prometheus metrics. Each process has one registry, passed explicitly. Labels are bounded, and names have units."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.gc_collector import GCCollector
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector

LATENCY_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
WAIT_BUCKETS_S = (0.01, 0.1, 0.5, 1.0, 5.0, 15.0, 60.0, 300.0, 900.0, 3_600.0, 14_400.0, 86_400.0)
SIZE_BUCKETS = (1.0, 4.0, 16.0, 64.0, 256.0, 1_024.0)


def new_registry() -> CollectorRegistry:
    """A registry with the metrics of the process: memory, CPU, open files, garbage collection."""
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    PlatformCollector(registry=registry)
    GCCollector(registry=registry)
    return registry


class ServiceMetrics:
    """Metrics of all services. ``loop`` names a batch loop: ``shard``, ``timers``, ``ingest``, ``queries``."""

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        self.registry = registry if registry is not None else CollectorRegistry()
        r = self.registry
        self._handled = Counter("sublet_messages_handled", "Messages handled and acknowledged", ["loop"], registry=r)
        self._dead = Counter(
            "sublet_messages_dead_lettered", "Messages dead-lettered to the queue sublet.dead", ["loop"], registry=r
        )
        self._batch_size = Histogram(
            "sublet_batch_size", "Messages in a batch", ["loop"], buckets=SIZE_BUCKETS, registry=r
        )
        self._batch_seconds = Histogram(
            "sublet_batch_seconds",
            "Time to handle a batch, with its commit",
            ["loop"],
            buckets=LATENCY_BUCKETS_S,
            registry=r,
        )
        self._store_seconds = Histogram(
            "sublet_store_seconds",
            "Time of a round trip to MongoDB",
            ["operation"],
            buckets=LATENCY_BUCKETS_S,
            registry=r,
        )
        self._publish_seconds = Histogram(
            "sublet_publish_seconds",
            "Time from publishing messages to the broker's confirmation",
            buckets=LATENCY_BUCKETS_S,
            registry=r,
        )
        self._anomaly_count = Counter(
            "sublet_sweeper_anomalies",
            "Inconsistencies repaired by a sweeper; a non-zero rate in normal operation indicates a bug",
            ["sweeper"],
            registry=r,
        )

    def handled(self, loop: str, count: int) -> None:
        self._handled.labels(loop).inc(count)

    def dead_lettered(self, loop: str) -> None:
        self._dead.labels(loop).inc()

    def batch(self, loop: str, size: int, seconds: float) -> None:
        self._batch_size.labels(loop).observe(size)
        self._batch_seconds.labels(loop).observe(seconds)

    def store(self, operation: str, seconds: float) -> None:
        self._store_seconds.labels(operation).observe(seconds)

    def published(self, seconds: float) -> None:
        self._publish_seconds.observe(seconds)

    def count_anomalies(self, sweeper: str, count: int = 1) -> None:
        self._anomaly_count.labels(sweeper).inc(count)
