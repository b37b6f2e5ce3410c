"""Prometheus metrics of the scheduler. The counters are moved from each shard after every batch. The gauges are read
from the shards at each scrape."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping

from prometheus_client import Counter, Histogram
from prometheus_client.core import GaugeMetricFamily, Metric

from sublet_engine.shard.counters import WAITING_REASONS
from sublet_engine.shard.shard import Shard
from sublet_platform.metrics import LATENCY_BUCKETS_S, WAIT_BUCKETS_S, ServiceMetrics
from sublet_protocol import limits

_KNOWN_FAILURES = ("TimeoutError", "WorkerLost", "NonDeterminismError", "LogFull", "IllegalTaskOutputError")
"""Error types that are labels. The exception classes of users are not, because their number is unbounded."""


NAMED_MAX = 10
"""The maximum number of leases, tickets or task runs in one log line."""

logger = logging.getLogger(__name__)


class SchedulerMetrics:
    def __init__(self, metrics: ServiceMetrics) -> None:
        registry = metrics.registry
        self._service = metrics
        self._shards: dict[int, Shard] = {}
        self._evictions = Counter("sublet_evictions", "Evictions of durable tasks", registry=registry)
        self._resumes = Counter("sublet_resumes", "Grants of durable tasks after a wait", registry=registry)
        self._resume_s = Histogram(
            "sublet_resume_seconds",
            "Time from the end of a wait to the grant",
            buckets=LATENCY_BUCKETS_S,
            registry=registry,
        )
        self._wait_s = Histogram(
            "sublet_task_wait_seconds",
            "Time from ready to granted, at the start of a task",
            buckets=WAIT_BUCKETS_S,
            registry=registry,
        )
        self._finished = Counter("sublet_runs_finished", "Finished runs", ["status"], registry=registry)
        self._failures = Counter(
            "sublet_task_failures",
            "Failed attempts of tasks, including retried ones",
            ["reason"],
            registry=registry,
        )
        self._tickets = Counter("sublet_tickets_issued", "Tickets published to pool queues", registry=registry)
        self._grants = Counter("sublet_grants", "Leases granted", ["reused"], registry=registry)
        self._lost = Counter(
            "sublet_leases_lost",
            "Leases whose worker was lost or never got them",
            registry=registry,
        )
        self._stale = Counter("sublet_stale_reports", "Reports under leases that had ended before", registry=registry)
        registry.register(self)

    def observe(self, index: int, shard: Shard) -> None:
        """Move the counts of a shard since the last call into the counters."""
        self._shards[index] = shard
        counters = shard.state.counters
        self._evictions.inc(counters.evictions)
        self._resumes.inc(counters.resumes)
        self._tickets.inc(counters.tickets_issued)
        self._grants.labels("yes").inc(counters.grants_reused)
        self._grants.labels("no").inc(counters.grants - counters.grants_reused)
        self._lost.inc(counters.leases_lost)
        self._stale.inc(counters.stale_reports)
        for seconds in counters.resume_s:
            self._resume_s.observe(seconds)
        for seconds in counters.ready_s:
            self._wait_s.observe(seconds)
        for status, count in counters.finished.items():
            self._finished.labels(status).inc(count)
        for reason, count in counters.failures.items():
            self._failures.labels(reason if reason in _KNOWN_FAILURES else "exception").inc(count)
        for what, names in counters.anomalies.items():
            self._service.count_anomalies(what, len(names))
            logger.warning(
                "shard %d: sweeper found %s: %s", index, what, ", ".join(names[:NAMED_MAX]), extra={"count": len(names)}
            )
        if counters.long_logs:
            _warn_of_long_logs(index, counters.long_logs)
        counters.clear()

    def forget(self, index: int) -> None:
        """Stop showing the gauges of a shard, because this process does not own it any more."""
        self._shards.pop(index, None)

    def collect(self) -> Iterable[Metric]:
        """The gauges of all shards of this process."""
        slots = GaugeMetricFamily("sublet_slots", "Slots of live workers", labels=["pool", "kind", "state"])
        tasks = GaugeMetricFamily("sublet_tasks", "Ready and running tasks", labels=["pool", "kind", "state"])
        waiting = GaugeMetricFamily("sublet_waiting", "Tasks that wait without a slot", labels=["reason"])
        shards = GaugeMetricFamily("sublet_shards_held", "Shards that this process owns")
        shards.add_metric([], len(self._shards))
        for labels, value in self._slots().items():
            slots.add_metric(labels, value)
        for labels, value in self._tasks().items():
            tasks.add_metric(labels, value)
        for reason, value in self._waiting().items():
            waiting.add_metric([reason], value)
        return [slots, tasks, waiting, shards]

    def _slots(self) -> dict[tuple[str, str, str], float]:
        """Every shard knows the total slots, but only the leases that it granted itself. So a scheduler shows the slots
        taken by its own shards; the sum over all schedulers is the number of taken slots."""
        values: dict[tuple[str, str, str], float] = {}
        for shard in self._shards.values():
            for pool, kind, capacity, taken in shard.occupancy():
                values[pool, kind, "total"] = capacity
                values[pool, kind, "taken"] = values.get((pool, kind, "taken"), 0) + taken
        return values

    def _tasks(self) -> dict[tuple[str, str, str], float]:
        values: dict[tuple[str, str, str], float] = {}
        for shard in self._shards.values():
            for queue in shard.state.ready:
                for state, count in (("ready", len(queue)), ("running", queue.running)):
                    key = (queue.pool, queue.kind, state)
                    values[key] = values.get(key, 0) + count
        return values

    def _waiting(self) -> dict[str, float]:
        values = dict.fromkeys(WAITING_REASONS, 0.0)
        for shard in self._shards.values():
            for reason, count in shard.state.counters.waiting.items():
                values[reason] = values.get(reason, 0) + count
        return values


def _warn_of_long_logs(index: int, long_logs: Mapping[str, int]) -> None:
    longest = sorted(long_logs.items(), key=lambda item: item[1], reverse=True)[:NAMED_MAX]
    logger.warning(
        "shard %d: durable logs near the limit of %d entries, at which the task fails: %s; "
        "move part of the work into child runs, each of which has a log of its own",
        index,
        limits.LOG_MAX_ENTRIES,
        ", ".join(f"{task_run} has {entries} entries" for task_run, entries in longest),
        extra={"count": len(long_logs)},
    )
