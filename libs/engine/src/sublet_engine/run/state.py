"""The state of runs: frozen records, stored as they are here, changed only by the decisions in this package."""

from __future__ import annotations

from typing import Literal

import msgspec

from sublet_protocol import ids
from sublet_protocol.messages import ParentLink, Record, RunStatus, TaskError, Trigger
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
    """The ticket it was granted under; "" once the slot has been released by hand."""
    granted_at: float
    deadline: float | None
    """When the execution timeout strikes; None while every branch waits (the clock stands still)."""
    active_left_s: float
    """Active time left when the clock was last stopped or started."""
    released: bool = False


class OpenWait(msgspec.Struct, frozen=True, omit_defaults=True):
    """An operation of a durable task that has not ended: conditions, or a child."""

    operation_id: str
    groups: Groups = ()
    met: tuple[tuple[str, str], ...] = ()
    """Conditions that came true: (key, value as JSON text)."""
    since: int = 0
    asked_at: float = 0.0
    """When it was asked for; its sleeps count from here, whatever happens to the task meanwhile."""
    child_run_id: str | None = None
    position: int = 0
    """The seq of the last event that met one of the conditions."""


class LogSegment(msgspec.Struct, frozen=True, array_like=True):
    """Log entries ``first`` … (up to the next segment's first) were written in ``owner_term``; others are leftovers."""

    first: int
    owner_term: str


class TaskRun(msgspec.Struct, frozen=True, omit_defaults=True):
    """One task of a run. Times are epoch seconds."""

    name: str
    status: TaskStatus = "PENDING"
    retry_count: int = 0
    """Re-executions of any kind; the number of the attempt, from 0."""
    replays: int = 0
    """How often it has been begun again by a replay of the run: each time it waits for its own timers and events."""
    retries_used: int = 0
    """Retries that the user's ``retries`` pays for."""
    losses: int = 0
    """Attempts lost with their worker since the last new checkpoint; bounded by `limits.MAX_LOSSES`."""
    invocation: int = 0
    """Leases so far; the number of the current one."""
    reports: int = 0
    """Numbered reports applied under the current lease."""
    lease: Lease | None = None
    resumed: bool = False
    """Ready again after a wait, a retry or a loss: goes before new work and has no schedule timeout."""
    ready_at: float | None = None
    schedule_deadline: float | None = None
    active_s: float = 0.0
    """Active time of earlier invocations of this attempt (durable tasks)."""
    timeout_bonus_s: float = 0.0
    """What ``refresh_timeout`` added in this attempt."""
    open_waits: tuple[OpenWait, ...] = ()
    blocked: tuple[tuple[str, ...], ...] = ()
    delivered: int = 0
    """The highest order that the evicted code had seen."""
    completed_count: int = 0
    """Operations that have ended: the order of the last one."""
    log_length: int = 0
    log_bytes: int = 0
    log_segments: tuple[LogSegment, ...] = ()
    met: tuple[str, ...] = ()
    """DAG: the keys of the conditions that came true."""
    armed: bool = False
    """DAG: the sleeps have begun, because the parents are done."""
    output: str | None = None
    error: TaskError | None = None
    reason: str | None = None
    """Why it was cancelled or skipped."""
    queued_at: float | None = None
    started_at: float | None = None
    evicted_at: float | None = None
    waits_for: str = ""
    """Why it is evicted, in one word (see `counters.WAITING_REASONS`), as it was at the checkpoint."""
    finished_at: float | None = None

    @property
    def terminal(self) -> bool:
        return self.status in TERMINAL_TASK


class OutboxItem(msgspec.Struct, frozen=True, omit_defaults=True):
    """An effect that must not be lost: stored with the state that caused it, published after the commit."""

    to: str
    """``bucket:<routing key>``, ``timers``, ``ingest`` or ``inbox:<name>``."""
    message: str
    """The record as JSON text."""


class Run(msgspec.Struct, frozen=True, omit_defaults=True):
    """One execution of a workflow. ``tasks`` stand in the order of the definition and never change places."""

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
    """The task that started it, waiting or not."""
    child_index: int | None = None
    child_key: str | None = None
    trigger: Trigger | None = None
    watchers: tuple[str, ...] = ()
    """Inboxes that get the RunResult."""
    error: TaskError | None = None
    """Why the run could not begin (unknown workflow)."""
    cancelled_reason: str | None = None
    replayed_by: str | None = None
    """The correlation id of the request that replayed it last: one that comes twice replays once."""
    started_at: float | None = None
    finished_at: float | None = None
    outbox: tuple[OutboxItem, ...] = ()
    """Effects of the last update. They are published again when another owner than the writer loads the run."""
    needs_republish: bool = False
    """The last update came from no message about this run that would come again after a crash (time passed, a worker
    got lost): the next owner of the shard has to look for its outbox."""
    revision: int = 0
    owner_term: str = ""
    """Who wrote it: one ownership of the shard by one process."""

    @property
    def terminal(self) -> bool:
        return self.finished_at is not None

    @property
    def live(self) -> bool:
        """Something of it is ready, under a lease or unasked: whoever owns the shard must have it in memory."""
        return self.needs_republish or any(task.status in ("READY", "RUNNING") for task in self.tasks)

    def task(self, name: str) -> TaskRun:
        for task in self.tasks:
            if task.name == name:
                return task
        raise KeyError(f"run {self.id} has no task {name!r}")

    def with_task(self, task: TaskRun) -> Run:
        """The run with this task in the place of its namesake."""
        tasks = tuple(task if other.name == task.name else other for other in self.tasks)
        return msgspec.structs.replace(self, tasks=tasks)

    def task_run_id(self, task: TaskRun) -> str:
        return ids.task_run_id(self.id, task.name)


class LogRecord(msgspec.Struct, frozen=True, omit_defaults=True):
    """A document of the durable log: an operation that was asked for, or the end of one. Never changed.

    The id holds the epoch of the writer, and the run says which epoch wrote which entries: what a writer left
    behind that never committed its run does not count.
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


class Effect(msgspec.Struct, frozen=True):
    """Something to publish after the commit. ``durable`` ones are in the outbox of the run as well."""

    to: str
    """As in :class:`OutboxItem`; also ``pool:<pool>:<kind>`` for tickets and ``notice:<routing key>``."""
    message: Record
    durable: bool = True
