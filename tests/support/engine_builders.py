"""Short ways to build what the engine works on, and a bench that makes decisions one after another and checks each."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import msgspec
from msgspec.structs import replace

from sublet_engine.run import completion, durable_log, leases, transitions
from sublet_engine.run.effects import Effects
from sublet_engine.run.state import Lease, LogRecord, OpenWait, OutgoingMessage, Run, TaskRun
from sublet_protocol import ids
from sublet_protocol.destinations import Destination
from sublet_protocol.messages import (
    ChildFinished,
    ChildRequest,
    EventMatched,
    Evicted,
    Failed,
    Finished,
    Grant,
    IngestMessage,
    LogEntry,
    Operation,
    Record,
    Recorded,
    RunRequest,
    RunStatus,
    ShardMessage,
    TaskError,
    TaskNotice,
    Ticket,
    TimerFired,
    TimerMessage,
    WorkerMessage,
)
from sublet_protocol.raw_json import NULL
from sublet_protocol.specs import (
    Condition,
    EventCondition,
    Groups,
    ParentCondition,
    SleepCondition,
    TaskSpec,
    WorkflowSpec,
    digest,
    topological,
)
from support import invariants

NOW = 1_700_000_000.0
RUN_ID = "9f3c0c1e-6f43-4f0e-8f3a-0d6f3f1f2a10"
WORKER, INBOX, POOL = "worker-1", "sublet.inbox.worker.worker-1", "main-12345678"

R = TypeVar("R", bound=Record)


# --- definitions ------------------------------------------------------------------------------------------------


def workflow(*tasks: TaskSpec | str, name: str = "flow", **options: Any) -> WorkflowSpec:
    """A workflow as a shard knows it: parents before children, versioned."""
    specs = tuple(TaskSpec(task) if isinstance(task, str) else task for task in tasks)
    spec = WorkflowSpec(name, topological(specs), **options)
    return replace(spec, version=digest(spec))


def sleep(duration_s: float = 5.0, key: str = "sleep") -> SleepCondition:
    return SleepCondition(key, duration_s)


def event(event_key: str = "paid", key: str | None = None, **options: Any) -> EventCondition:
    return EventCondition(key or event_key, event_key, **options)


def parent(name: str, expression: str | None = None, key: str | None = None) -> ParentCondition:
    return ParentCondition(key or f"parent:{name}", name, expression)


def both(*conditions: Condition) -> Groups:
    """All of them have to come true."""
    return tuple((condition,) for condition in conditions)


def either(*conditions: Condition) -> Groups:
    """One of them is enough."""
    return (conditions,)


# --- operations of durable tasks --------------------------------------------------------------------------------


def wait_op(operation_id: str, groups: Groups | Condition, since: int = 0) -> Operation:
    groups = groups if isinstance(groups, tuple) else both(groups)
    return Operation(
        operation_id,
        "wait",
        fingerprint=f"wait {operation_id}",
        asked=f"wait at {operation_id}",
        groups=groups,
        since=since,
    )


def run_op(operation_id: str, child: str = "child", **options: Any) -> Operation:
    return Operation(
        operation_id,
        "run",
        fingerprint=f"run {operation_id}",
        asked=f"run {child}",
        child=ChildRequest(child, **options),
    )


def memo_op(operation_id: str, value: object = 1) -> Operation:
    return Operation(operation_id, "memo", fingerprint=f"memo {operation_id}", asked="memo", result=raw(value))


def raw(value: object) -> msgspec.Raw:
    return msgspec.Raw(msgspec.json.encode(value))


def error(kind: str = "ValueError", message: str = "no") -> TaskError:
    return TaskError(kind, message)


_records: msgspec.json.Decoder[Any] = msgspec.json.Decoder(
    ShardMessage | WorkerMessage | TimerMessage | IngestMessage | Ticket | TaskNotice
)


def record_of(message: OutgoingMessage) -> Record:
    """The record that was encoded into a message."""
    record: Record = _records.decode(message.body)
    return record


# --- one run under test -----------------------------------------------------------------------------------------


class RunHarness:
    """A run to which things happen. Each step is checked against the invariants; ``now`` moves by `pass_time` only.

    ``messages`` and ``log`` are those of the last step, ``whole_log`` is what a store would hold.
    """

    def __init__(self, *tasks: TaskSpec | str, spec: WorkflowSpec | None = None, **request: Any) -> None:
        self.workflow = spec if spec is not None else workflow(*tasks)
        self.now = NOW
        self.owner_term = "epoch-1"
        self.whole_log: list[LogRecord] = []
        self.messages: list[OutgoingMessage] = []
        self.log: list[LogRecord] = []
        effects = Effects(self.now, self.owner_term)
        request.setdefault("run_id", RUN_ID)
        self.run = transitions.create(RunRequest(workflow=self.workflow.name, **request), self.workflow, effects)
        invariants.check(self.run, self.workflow)
        self._take(effects)

    # --- what can happen ----------------------------------------------------------------------------------------

    def pass_time(self, by_s: float) -> None:
        self.now += by_s

    def grant(self, name: str = "task", worker: str = WORKER, ticket: str = "ticket-1") -> str:
        """Returns the lease."""
        self._step(
            lambda effects: leases.grant(
                self.run,
                name,
                self.workflow,
                worker=worker,
                inbox=f"sublet.inbox.worker.{worker}",
                pool=POOL,
                ticket=ticket,
                now=effects.now,
            )
        )
        return self.lease(name)

    def finish(self, lease: str, output: object = None) -> None:
        report = Finished(lease, None, raw(output) if output is not None else NULL)
        self._step(lambda effects: transitions.finish(self.run, report, self.workflow, effects))

    def fail(self, lease: str, *, retryable: bool = True, kind: str = "ValueError") -> None:
        report = Failed(lease, None, error(kind), retryable=retryable)
        self._step(lambda effects: transitions.fail(self.run, report, self.workflow, effects))

    def evict(
        self, lease: str, *operations: Operation, blocked: Iterable[tuple[str, ...]] | None = None, **report: Any
    ) -> None:
        """``blocked``: unless given, one branch for each operation but memos."""
        waits = [operation.operation_id for operation in operations if operation.kind != "memo"]
        branches = tuple(blocked) if blocked is not None else tuple((operation_id,) for operation_id in waits)
        message = Evicted(lease, None, operations, branches, report.pop("delivered", 0), **report)
        self._step(lambda effects: transitions.evict(self.run, message, self.workflow, effects))

    def record(self, lease: str, *operations: Operation, number: int, waiting: bool = False) -> None:
        message = Recorded(lease, operations, waiting, number=number)
        self._step(lambda effects: transitions.record(self.run, message, self.workflow, effects))

    def worker_lost(self, lease: str) -> None:
        self._step(lambda effects: transitions.worker_lost(self.run, lease, self.workflow, effects))

    def grant_declined(self, lease: str) -> None:
        self._step(lambda effects: transitions.grant_declined(self.run, lease, self.workflow, effects))

    def release(self, lease: str) -> None:
        self._step(lambda effects: leases.release(self.run, lease))

    def extend(self, lease: str, by_s: float, number: int) -> None:
        self._step(lambda effects: leases.extend(self.run, lease, by_s, number))

    def time_out(self, name: str = "task") -> None:
        self._step(lambda effects: transitions.time_out(self.run, self.task(name), self.workflow, effects))

    def schedule_time_out(self, name: str = "task") -> None:
        self._step(lambda effects: transitions.schedule_time_out(self.run, self.task(name), self.workflow, effects))

    def _place(self, operation_id: str, name: str) -> str:
        return ids.wait_key(operation_id, self.task(name).replays)

    def fire(self, operation_id: str = completion.DAG_WAIT, key: str = "sleep", name: str = "task") -> None:
        message = TimerFired(self.task_run(name), self._place(operation_id, name), key)
        self._step(lambda effects: transitions.timer_fired(self.run, message, self.workflow, effects))

    def match(
        self,
        operation_id: str = completion.DAG_WAIT,
        key: str = "paid",
        name: str = "task",
        seq: int = 1,
        payload: object = None,
    ) -> None:
        message = EventMatched(
            self.task_run(name), self._place(operation_id, name), key, f"event-{seq}", seq, raw(payload or {"seq": seq})
        )
        self._step(lambda effects: transitions.event_matched(self.run, message, self.workflow, effects))

    def child_ended(
        self,
        operation_id: str,
        child_run_id: str,
        *,
        output: object = None,
        failed: TaskError | None = None,
        at: float | None = None,
    ) -> None:
        status: RunStatus = "COMPLETED" if failed is None else "FAILED"
        message = ChildFinished(self.task_run("task"), operation_id, child_run_id, status, raw(output), failed, at)
        self._step(lambda effects: transitions.child_finished(self.run, message, self.workflow, effects))

    def cancel(self) -> None:
        self._step(lambda effects: transitions.cancel(self.run, self.workflow, effects))

    def cancel_task(self, name: str) -> None:
        self._step(lambda effects: transitions.cancel_task(self.run, name, self.workflow, effects))

    def replay(self) -> None:
        self._step(lambda effects: transitions.replay(self.run, self.workflow, effects))

    def watch(self, inbox: str) -> None:
        self._step(lambda effects: transitions.watch(self.run, inbox, self.workflow, effects))

    def add_interest(self, **request: Any) -> None:
        message = RunRequest(RUN_ID, self.workflow.name, **request)
        self._step(lambda effects: transitions.add_interest(self.run, message, self.workflow, effects))

    def run_task(self, name: str, output: object = None) -> None:
        """Granted and finished."""
        self.finish(self.grant(name), output)

    def changes_nothing(self, step: Callable[[], None]) -> bool:
        """Whether the step left everything as it was."""
        before = self.run
        step()
        return self.run is before and not self.messages and not self.log

    # --- what there is ------------------------------------------------------------------------------------------

    def task(self, name: str = "task") -> TaskRun:
        return self.run.task(name)

    def task_run(self, name: str = "task") -> str:
        return ids.task_run_id(self.run.id, name)

    def lease(self, name: str = "task") -> str:
        return ids.lease_id(self.task_run(name), self.task(name).invocation)

    def held(self, name: str = "task") -> Lease:
        lease = self.task(name).lease
        assert lease is not None, f"{name} is not running"
        return lease

    def error(self, name: str = "task") -> TaskError:
        error = self.task(name).error
        assert error is not None, f"{name} has no error"
        return error

    def status(self, name: str = "task") -> str:
        return self.task(name).status

    def statuses(self) -> dict[str, str]:
        return {task.name: task.status for task in self.run.tasks}

    def grant_message(self, name: str = "task") -> Grant:
        """As a scheduler sends it, but for the durable log."""
        task = self.task(name)
        return leases.grant_message(self.run, task, self.workflow, self.now, claim_key="claims", shards=4)

    def open_wait(self, operation_id: str) -> OpenWait:
        found = durable_log.open_wait(self.task(), operation_id)
        assert found is not None, f"no wait is open at {operation_id}"
        return found

    def sent(self, kind: type[R], to: Destination | None = None) -> list[R]:
        """The messages of a kind that the last step gave, to any destination or to one."""
        records = [record_of(message) for message in self.messages if to in (None, message.to)]
        return [record for record in records if isinstance(record, kind)]

    def entries(self, name: str = "task") -> dict[str, LogEntry]:
        """The log by node, as the next grant would carry it."""
        task_run = self.task_run(name)
        records = [entry for entry in self.whole_log if entry.task_run_id == task_run]
        return {
            entry.operation_id: entry
            for entry in durable_log.entries_of(durable_log.committed(self.task(name), records))
        }

    def _step(self, decide: Callable[[Effects], Run]) -> None:
        effects = Effects(self.now, self.owner_term)
        after = decide(effects)
        invariants.check_step(self.run, after, self.workflow)
        self.run = after
        self._take(effects)

    def _take(self, effects: Effects) -> None:
        self.messages, self.log = effects.messages, effects.log
        self.whole_log += effects.log
