"""Prometheus metrics. One registry for each process, handed over explicitly; labels are bounded, units are in names."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.gc_collector import GCCollector
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector

LATENCY_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
WAIT_BUCKETS_S = (0.01, 0.1, 0.5, 1.0, 5.0, 15.0, 60.0, 300.0, 900.0, 3_600.0, 14_400.0, 86_400.0)
SIZE_BUCKETS = (1.0, 4.0, 16.0, 64.0, 256.0, 1_024.0)


def new_registry() -> CollectorRegistry:
    """A registry with what every process shows of itself: memory, CPU, open files, garbage collection."""
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    PlatformCollector(registry=registry)
    GCCollector(registry=registry)
    return registry


class ServiceMetrics:
    """What every service counts. ``loop`` names a batch loop: ``shard``, ``timers``, ``ingest``, ``queries``."""

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        self.registry = registry if registry is not None else CollectorRegistry()
        r = self.registry
        self._handled = Counter("sublet_messages_handled", "Messages handled and acknowledged", ["loop"], registry=r)
        self._dead = Counter("sublet_messages_dead_lettered", "Messages sent to sublet.dead", ["loop"], registry=r)
        self._batch_size = Histogram(
            "sublet_batch_size", "Messages in a batch", ["loop"], buckets=SIZE_BUCKETS, registry=r
        )
        self._batch_seconds = Histogram(
            "sublet_batch_seconds", "Handling a batch, commit included", ["loop"], buckets=LATENCY_BUCKETS_S, registry=r
        )
        self._store_seconds = Histogram(
            "sublet_store_seconds", "Round trips to MongoDB", ["operation"], buckets=LATENCY_BUCKETS_S, registry=r
        )
        self._publish_seconds = Histogram(
            "sublet_publish_seconds", "Publishing until the broker confirms", buckets=LATENCY_BUCKETS_S, registry=r
        )
        self._anomalies = Counter(
            "sublet_sweeper_findings",
            "What a sweeper found and mended: each is a bug's smoke, or a lost hint",
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

    def found(self, sweeper: str, count: int = 1) -> None:
        self._anomalies.labels(sweeper).inc(count)


class TimerMetrics:
    def __init__(self, registry: CollectorRegistry) -> None:
        self.pending = Gauge("sublet_timers_pending", "Timers that are set and not due", registry=registry)
        self.lag_seconds = Histogram(
            "sublet_timer_lag_seconds", "From due to fired", buckets=LATENCY_BUCKETS_S, registry=registry
        )


class IngestMetrics:
    def __init__(self, registry: CollectorRegistry) -> None:
        self.events = Counter("sublet_events", "Events received", ["outcome"], registry=registry)
        """outcome: ``stored``, ``duplicate`` or ``refused``."""
        self.matches = Counter("sublet_event_matches", "Waits and triggers that an event met", registry=registry)
        self.subscriptions = Gauge("sublet_subscriptions", "Waits for an event", registry=registry)
        self.expression_failures = Counter(
            "sublet_expression_failures", "Expressions that failed on a payload", registry=registry
        )
