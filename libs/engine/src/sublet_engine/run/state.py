"""The state of runs: frozen records that are stored in this form. Only the decisions in this package change them."""

from __future__ import annotations

from typing import Literal

import msgspec

from sublet_protocol import ids
from sublet_protocol.destinations import Destination
from sublet_protocol.messages import ParentLink, RunStatus, TaskError, Trigger
from sublet_protocol.specs import Groups

TaskStatus = Literal[
    "PENDING",  # waits for parents, sleeps or events (DAG); no ticket, no slot
    "READY",  # may run: waits for a slot
    "RUNNING",  # under a lease
    "EVICTED",  # a durable task that waits: no lease, no slot
    "BACKOFF",  # waits for the delay before its next attempt
    "COMPLETED",
    "SKIPPED",
    "FAILED",
    "CANCELLED",
]
TERMINAL_TASK = frozenset(("COMPLETED", "SKIPPED", "FAILED", "CANCELLED"))


class Lease(msgspec.Struct, frozen=True, omit_defaults=True):
    """The right of one worker to run one invocation. Its id is (task run, invocation)."""

    worker: str
    inbox: str
    pool: str
    ticket: str
    """The ticket under which it was granted; "" after ``release_slot()``."""
    granted_at: float
    deadline: float | None
    """When the execution timeout expires (Unix seconds); None while every branch waits (the clock has stopped)."""
    active_left_s: float
    """Active time left (seconds) when the clock was last stopped or started."""
    released: bool = False


class OpenWait(msgspec.Struct, frozen=True, omit_defaults=True):
    """An operation of a durable task that has not ended: conditions, or a child."""

    operation_id: str
    groups: Groups = ()
    met: tuple[tuple[str, str], ...] = ()
    """Conditions that came true: (key, value as JSON text)."""
    since: int = 0
    asked_at: float = 0.0
    """When the operation was asked for (Unix seconds). Its sleeps are measured from here, also after a replay."""
    child_run_id: str | None = None
    position: int = 0
    """The seq of the last event that met one of the conditions."""


class LogSegment(msgspec.Struct, frozen=True, array_like=True):
    """The valid log entries from ``first`` up to the ``first`` of the next segment were written in ``owner_term``.
    Entries of another term are leftovers of an owner that never committed them."""

    first: int
    owner_term: str


class TaskRun(msgspec.Struct, frozen=True, omit_defaults=True):
    """One task of a run. Times are Unix seconds."""

    name: str
    status: TaskStatus = "PENDING"
    retry_count: int = 0
    """Re-executions of any kind; the number of the attempt, from 0."""
    replays: int = 0
    """How often a replay of the run has restarted it. Each replay has its own timers and subscriptions."""
    retries_used: int = 0
    """Retries that count against the user's ``retries``."""
    losses: int = 0
    """Attempts lost with their worker since the last new checkpoint; bounded by `limits.MAX_LOSSES`."""
    invocation: int = 0
    """Leases so far; the number of the current one."""
    reports: int = 0
    """Numbered reports applied under the current lease."""
    lease: Lease | None = None
    resumed: bool = False
    """Ready again after a wait, a retry or a loss: it goes before new tasks."""
    ready_at: float | None = None
    schedule_deadline: float | None = None
    active_s: float = 0.0
    """Active time of earlier invocations of this attempt (durable tasks)."""
    timeout_bonus_s: float = 0.0
    """Seconds that ``refresh_timeout`` added in this attempt."""
    open_waits: tuple[OpenWait, ...] = ()
    blocked: tuple[tuple[str, ...], ...] = ()
    delivered: int = 0
    """The highest order of a completion that the evicted code had received."""
    completed_count: int = 0
    """Operations that have ended: the order of the last one."""
    log_length: int = 0
    log_bytes: int = 0
    log_segments: tuple[LogSegment, ...] = ()
    met: tuple[str, ...] = ()
    """DAG: the keys of the conditions that came true."""
    armed: bool = False
    """DAG: the parents are done, and the sleeps have started."""
    output: str | None = None
    error: TaskError | None = None
    reason: str | None = None
    """Why it was cancelled or skipped."""
    queued_at: float | None = None
    started_at: float | None = None
    evicted_at: float | None = None
    waits_for: str = ""
    """Why it waited at its last checkpoint: one of `counters.WAITING_REASONS`."""
    finished_at: float | None = None

    @property
    def terminal(self) -> bool:
        return self.status in TERMINAL_TASK


class OutgoingMessage(msgspec.Struct, frozen=True, omit_defaults=True):
    """A message to publish after the commit. ``body``: the encoded record, one JSON object."""

    to: Destination
    body: bytes
    durable: bool = True
    """Nobody would ask for the message again. It is stored in the outbox of its run, if it belongs to one, and its
    publish must be confirmed before the batch is acknowledged."""


class Run(msgspec.Struct, frozen=True, omit_defaults=True):
    """One execution of a workflow. ``tasks`` are always in the order of the definition. Times are Unix seconds."""

    id: str
    workflow: str
    version: str
    input: str
    created_at: float
    tasks: tuple[TaskRun, ...] = ()
    status: RunStatus = "QUEUED"
    metadata: dict[str, object] = {}
    priority: int = 1
    parents: tuple[ParentLink, ...] = ()
    """Durable tasks that wait for this run; each gets a ChildFinished."""
    parent: ParentLink | None = None
    """The task that started it, whether that task waits for it or not."""
    child_index: int | None = None
    child_key: str | None = None
    trigger: Trigger | None = None
    watchers: tuple[str, ...] = ()
    """Inboxes that get the RunResult."""
    error: TaskError | None = None
    """Why the run could not start (unknown workflow)."""
    cancelled_reason: str | None = None
    replayed_by: str | None = None
    """The correlation id of the last replay request, so that a repeated request replays the run once."""
    started_at: float | None = None
    finished_at: float | None = None
    outbox: tuple[OutgoingMessage, ...] = ()
    """Messages of the last update. They are published again when another owner than the writer loads the run."""
    needs_republish: bool = False
    """No message caused the last update (a deadline expired, a worker was lost), so none is redelivered after a crash.
    The next owner of the shard must load the run and publish its outbox again."""
    revision: int = 0
    owner_term: str = ""
    """The owner term in which it was written last."""

    @property
    def terminal(self) -> bool:
        return self.finished_at is not None

    @property
    def live(self) -> bool:
        """The owner of the shard must have the run in memory: a task is ready or has a lease, or the outbox must be
        published again."""
        return self.needs_republish or any(task.status in ("READY", "RUNNING") for task in self.tasks)

    def task(self, name: str) -> TaskRun:
        for task in self.tasks:
            if task.name == name:
                return task
        raise KeyError(f"run {self.id} has no task {name!r}")

    def with_task(self, task: TaskRun) -> Run:
        """The run with this task instead of the one with the same name."""
        tasks = tuple(task if other.name == task.name else other for other in self.tasks)
        return msgspec.structs.replace(self, tasks=tasks)

    def task_run_id(self, task: TaskRun) -> str:
        return ids.task_run_id(self.id, task.name)


class LogRecord(msgspec.Struct, frozen=True, omit_defaults=True):
    """A document of the durable log: an operation that was asked for, or its completion. Never changed.

    The id contains the owner term of the writer, and the run says which term wrote which entries. Entries of a writer
    that never committed the run are ignored.
    """

    id: str
    task_run_id: str
    seq: int
    owner_term: str
    operation_id: str
    kind: Literal["wait", "run", "memo", "done"]
    at: float
    fingerprint: str = ""
    asked: str = ""
    label: str | None = None
    result: str | None = None
    error: TaskError | None = None
    child_run_id: str | None = None
    order: int = 0
    position: int = 0
    version: str = ""
    retry_count: int = 0
