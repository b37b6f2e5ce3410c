"""The effects of one decision: messages to publish and entries for the durable log."""

from __future__ import annotations

from dataclasses import dataclass, field

from sublet_engine.run.state import LogRecord, OutgoingMessage, Run, TaskRun
from sublet_protocol import ids
from sublet_protocol.destinations import Bucket, Destination, Inbox, Ingest, Notice, Timer
from sublet_protocol.messages import CancelTimer, Record, SetTimer, Subscribe, Unsubscribe, encode_one
from sublet_protocol.specs import Condition, EventCondition, SleepCondition


def position_at(at: float) -> int:
    """A time (Unix seconds) as a position in the order of events (microseconds)."""
    return int(at * 1_000_000)


@dataclass(slots=True)
class Effects:
    """Collects the effects of a decision. ``now``: Unix seconds. ``owner_term``: that of the shard, for log records."""

    now: float
    owner_term: str = ""
    messages: list[OutgoingMessage] = field(default_factory=list)
    log: list[LogRecord] = field(default_factory=list)

    @property
    def position(self) -> int:
        return position_at(self.now)

    def emit(self, to: Destination, message: Record, *, durable: bool = True) -> None:
        self.messages.append(OutgoingMessage(to, encode_one(message), durable))

    def to_run(self, run_id: str, message: Record) -> None:
        self.emit(Bucket(ids.bucket_of(run_id)), message)

    def to_inbox(self, inbox: str, message: Record, *, durable: bool = False) -> None:
        self.emit(Inbox(inbox), message, durable=durable)

    def notify(self, routing_key: str, message: Record) -> None:
        self.emit(Notice(routing_key), message, durable=False)

    def set_timer(self, run: Run, task: TaskRun, operation_id: str, key: str, due: float) -> None:
        task_run, wait_key = run.task_run_id(task), ids.wait_key(operation_id, task.replays)
        self.emit(Timer(), SetTimer(ids.wait_id(task_run, wait_key, key), due, task_run, wait_key, key))

    def cancel_timer(self, run: Run, task: TaskRun, operation_id: str, key: str) -> None:
        self.emit(Timer(), CancelTimer(_wait_id(run, task, operation_id, key)))

    def arm(self, run: Run, task: TaskRun, operation_id: str, condition: Condition, since: int) -> None:
        """Set the timer of a sleep, or subscribe to an event after the position ``since``."""
        if isinstance(condition, SleepCondition):
            self.set_timer(run, task, operation_id, condition.key, self.now + condition.duration_s)
        elif isinstance(condition, EventCondition):
            if condition.since_s is not None:
                since = min(since, position_at(condition.since_s))
            task_run, wait_key = run.task_run_id(task), ids.wait_key(operation_id, task.replays)
            wait = ids.wait_id(task_run, wait_key, condition.key)
            self.emit(Ingest(), Subscribe(wait, task_run, wait_key, condition, since))

    def withdraw(self, run: Run, task: TaskRun, operation_id: str, condition: Condition) -> None:
        """Undo :meth:`arm`. This is harmless if the condition has come true meanwhile or was never armed."""
        if isinstance(condition, SleepCondition):
            self.cancel_timer(run, task, operation_id, condition.key)
        elif isinstance(condition, EventCondition):
            self.emit(Ingest(), Unsubscribe(_wait_id(run, task, operation_id, condition.key)))


def _wait_id(run: Run, task: TaskRun, operation_id: str, key: str) -> str:
    return ids.wait_id(run.task_run_id(task), ids.wait_key(operation_id, task.replays), key)
