"""What one decision gives besides the new state: effects to publish and entries for the durable log."""

from __future__ import annotations

from dataclasses import dataclass, field

from sublet_engine.run.state import Effect, LogRecord, Run, TaskRun
from sublet_protocol import ids
from sublet_protocol.messages import CancelTimer, Record, SetTimer, Subscribe, Unsubscribe
from sublet_protocol.specs import Condition, EventCondition, SleepCondition
from sublet_protocol.topology import run_key


def position_at(at: float) -> int:
    """A moment (epoch seconds) as a place in the order of events (microseconds)."""
    return int(at * 1_000_000)


@dataclass(slots=True)
class Effects:
    """Collects what a decision gives. ``now``: epoch seconds. ``owner_term``: who will write (see `runs.LogRecord`)."""

    now: float
    owner_term: str = ""
    messages: list[Effect] = field(default_factory=list)
    log: list[LogRecord] = field(default_factory=list)

    @property
    def position(self) -> int:
        return position_at(self.now)

    def emit(self, to: str, message: Record, *, durable: bool = True) -> None:
        self.messages.append(Effect(to, message, durable))

    def to_run(self, run_id: str, message: Record) -> None:
        self.emit(f"bucket:{run_key(run_id)}", message)

    def to_inbox(self, inbox: str, message: Record, *, durable: bool = False) -> None:
        self.emit(f"inbox:{inbox}", message, durable=durable)

    def set_timer(self, run: Run, task: TaskRun, operation_id: str, key: str, due: float) -> None:
        task_run, wait_key = run.task_run_id(task), ids.wait_key(operation_id, task.replays)
        self.emit("timers", SetTimer(ids.wait_id(task_run, wait_key, key), due, task_run, wait_key, key))

    def cancel_timer(self, run: Run, task: TaskRun, operation_id: str, key: str) -> None:
        self.emit("timers", CancelTimer(_wait_id(run, task, operation_id, key)))

    def arm(self, run: Run, task: TaskRun, operation_id: str, condition: Condition, since: int) -> None:
        """Start the clock of a sleep, or begin to listen for an event from ``since`` on."""
        if isinstance(condition, SleepCondition):
            self.set_timer(run, task, operation_id, condition.key, self.now + condition.duration_s)
        elif isinstance(condition, EventCondition):
            if condition.since_s is not None:
                since = min(since, position_at(condition.since_s))
            task_run, wait_key = run.task_run_id(task), ids.wait_key(operation_id, task.replays)
            wait = ids.wait_id(task_run, wait_key, condition.key)
            self.emit("ingest", Subscribe(wait, task_run, wait_key, condition, since))

    def withdraw(self, run: Run, task: TaskRun, operation_id: str, condition: Condition) -> None:
        """Undo :meth:`arm`. Harmless when it has come true meanwhile, or was never armed."""
        if isinstance(condition, SleepCondition):
            self.cancel_timer(run, task, operation_id, condition.key)
        elif isinstance(condition, EventCondition):
            self.emit("ingest", Unsubscribe(_wait_id(run, task, operation_id, condition.key)))


def _wait_id(run: Run, task: TaskRun, operation_id: str, key: str) -> str:
    return ids.wait_id(run.task_run_id(task), ids.wait_key(operation_id, task.replays), key)
