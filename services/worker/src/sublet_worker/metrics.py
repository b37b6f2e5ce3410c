"""Prometheus metrics of a worker."""

from __future__ import annotations

from functools import partial

from prometheus_client import CollectorRegistry, Gauge

from sublet._worker.worker import Worker, WorkerStatus

STATES = ("running", "waiting", "released")


def show(worker: Worker, registry: CollectorRegistry) -> None:
    """Register gauges that are read at each scrape."""
    slots = Gauge("sublet_worker_slots", "Slots of this worker", ["kind"], registry=registry)
    slots.labels("task").set_function(lambda: worker.slots)
    slots.labels("durable").set_function(lambda: worker.durable_slots)
    held = Gauge("sublet_worker_tasks", "Tasks on this worker", ["state"], registry=registry)
    for state in STATES:
        held.labels(state).set_function(partial(_held, worker, state))
    up = Gauge("sublet_worker_healthy", "1 while the worker is connected and takes tasks", registry=registry)
    up.set_function(lambda: worker.status is WorkerStatus.HEALTHY)


def _held(worker: Worker, state: str) -> float:
    return worker.held[state]
