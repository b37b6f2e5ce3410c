"""Counts of what a shard did and of what it holds, for metrics. Updated with each change, never recounted."""

from __future__ import annotations

from collections import Counter, defaultdict

from sublet_engine.run.state import Run, TaskRun
from sublet_protocol import limits

WAITING_REASONS = ["sleep", "event", "child", "several", "backoff", "conditions", "parents"]


def waiting_reason(task: TaskRun) -> str | None:
    """Why a task waits without a slot: one of `WAITING_REASONS`, for a metric label; None if it does not wait."""
    if task.status == "EVICTED":
        return task.waits_for
    if task.status == "BACKOFF":
        return "backoff"
    if task.status == "PENDING":
        return "conditions" if task.armed else "parents"
    return None


class ShardCounters:
    """``waiting`` is a current state; all other counts are since the last :meth:`clear`."""

    def __init__(self) -> None:
        self.waiting: Counter[str] = Counter()
        """Tasks that wait without a slot, by reason. The first values are counted by the store."""
        self.clear()

    def clear(self) -> None:
        self.tickets_issued = 0
        self.grants = 0
        self.grants_reused = 0
        self.evictions = 0
        self.resumes = 0
        self.leases_lost = 0
        self.stale_reports = 0
        self.finished: Counter[str] = Counter()
        """Runs that ended, by status."""
        self.failures: Counter[str] = Counter()
        """Failed attempts of tasks, by error type."""
        self.anomalies: defaultdict[str, list[str]] = defaultdict(list)
        """What a sweeper repaired, by kind, with the ids of the leases or tickets. After an outage anomalies are
        expected; in normal operation they indicate a bug."""
        self.long_logs: dict[str, int] = {}
        """Number of entries of each durable log that has grown to `limits.LOG_WARN_ENTRIES` or more, by task run id."""
        self.resume_s: list[float] = []
        """Seconds from the end of the wait to the grant, resumed tasks."""
        self.ready_s: list[float] = []
        """Seconds from ready to the grant, new tasks."""

    def anomaly(self, what: str, *names: str) -> None:
        self.anomalies[what].extend(names)

    def granted(self, task: TaskRun, now: float, *, reused: bool) -> None:
        self.grants += 1
        self.grants_reused += reused
        since = now - (task.ready_at if task.ready_at is not None else now)
        if task.resumed and task.completed_count:
            self.resumes += 1
            self.resume_s.append(since)
        else:
            self.ready_s.append(since)

    def log_grown(self, task_run: str, old: TaskRun | None, new: TaskRun) -> None:
        """Record a durable log that has new entries and is near the limit of its length."""
        grown = old is None or new.log_length > old.log_length
        if grown and new.log_length >= limits.LOG_WARN_ENTRIES:
            self.long_logs[task_run] = new.log_length

    def changed(self, old: TaskRun | None, new: TaskRun) -> None:
        """A task changed. ``old`` None: it was created."""
        before = waiting_reason(old) if old is not None else None
        after = waiting_reason(new)
        if before is not None:
            self.waiting[before] -= 1
        if after is not None:
            self.waiting[after] += 1
        if old is None:
            return
        if new.evicted_at is not None and old.evicted_at is None:
            self.evictions += 1
        if new.error is not None and new.error is not old.error:
            self.failures[new.error.type] += 1

    def run_changed(self, before: Run | None, after: Run) -> None:
        if after.terminal and (before is None or not before.terminal):
            self.finished[after.status] += 1
