"""A digest of what a simulation did, free of names and texts.

Two versions of the code with the same behaviour give the same digest for the same seed, even if classes, messages or
log lines have other names: only ids, statuses, outputs, virtual times and message counts are part of it.
"""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING, Any

import msgspec

from sublet_engine.run.state import Run, TaskRun

if TYPE_CHECKING:
    from simulation.system.simulated_system import SimulatedSystem


def digest_of(system: SimulatedSystem) -> int:
    """Always the same for the same plan."""
    database, observers = system.database, system.observers
    projection = [
        [_run(run) for run in sorted(database.runs.values(), key=lambda run: run.id)],
        sorted((entry.id, entry.at, entry.order, entry.result) for entry in database.log.values()),
        sorted((event.id, event.seq) for event in database.events.values()),
        sorted(system.history.results.items()),
        [observers.sent_count, observers.received_count, observers.acked_count],
        [system.loop.time(), system.loop.steps, len(system.violations)],
    ]
    return zlib.crc32(msgspec.json.encode(projection, order="deterministic"))


def _run(run: Run) -> list[Any]:
    times = [run.created_at, run.started_at, run.finished_at]
    return [run.id, run.status, times, run.revision, len(run.outbox), [_task(run, task) for task in run.tasks]]


def _task(run: Run, task: TaskRun) -> list[Any]:
    times = [task.ready_at, task.queued_at, task.started_at, task.evicted_at, task.finished_at, task.active_s]
    counts = [
        task.retry_count,
        task.invocation,
        task.losses,
        task.completed_count,
        task.log_length,
        len(task.open_waits),
    ]
    return [run.task_run_id(task), task.status, task.output, task.error is not None, times, counts]
