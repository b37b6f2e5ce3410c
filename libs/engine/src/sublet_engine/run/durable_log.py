"""The durable log and the waits of a durable task: what opens a wait, what closes it, and when the code can resume."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec
from msgspec.structs import replace

from sublet_engine.run.effects import Effects, position_at
from sublet_engine.run.state import LogRecord, LogSegment, OpenWait, Run, TaskRun
from sublet_protocol import ids, limits
from sublet_protocol.messages import (
    ChildFinished,
    Completion,
    LogEntry,
    Operation,
    OperationCompleted,
    ParentLink,
    RunRequest,
    TaskError,
)
from sublet_protocol.raw_json import json_text, raw_json
from sublet_protocol.specs import Condition, EventCondition, SleepCondition


class LogFull(Exception):
    """The durable log of a task has reached a limit; the text says which and what to do."""


# --- writing --------------------------------------------------------------------------------------------------


def record(run: Run, task: TaskRun, operations: Iterable[Operation], effects: Effects) -> TaskRun:
    """Append new operations and arm their timers, subscriptions and children.

    Raises:
        LogFull: the task must fail, and ``effects`` must be discarded.
    """
    for operation in operations:
        task = _append(run, task, effects, operation=operation)
        if operation.kind == "wait":
            task = _open_conditions(run, task, operation, effects)
        elif operation.kind == "run":
            task = _open_child(run, task, operation, effects)
    return task


def _open_conditions(run: Run, task: TaskRun, operation: Operation, effects: Effects) -> TaskRun:
    wait = OpenWait(operation.operation_id, operation.groups, since=operation.since, asked_at=effects.now)
    for condition in conditions_of(wait):
        if not _has_elapsed(condition):
            effects.arm(run, task, operation.operation_id, condition, operation.since)
    return replace(task, open_waits=(*task.open_waits, wait))


def _has_elapsed(condition: Condition) -> bool:
    return isinstance(condition, SleepCondition) and condition.duration_s <= 0


def complete_elapsed_sleeps(run: Run, task: TaskRun, operations: Iterable[Operation], effects: Effects) -> TaskRun:
    """Complete sleeps of zero length at once instead of setting a timer."""
    for operation in operations:
        for group in operation.groups:
            for condition in group:
                if _has_elapsed(condition):
                    task = meet(run, task, operation.operation_id, condition.key, effects, seq=0)
    return task


def child_run_id(task_run: str, operation: Operation) -> str:
    assert operation.child is not None
    return ids.child_run_id(task_run, child_key=operation.child.child_key, operation_id=operation.operation_id)


def _open_child(run: Run, task: TaskRun, operation: Operation, effects: Effects) -> TaskRun:
    child = operation.child
    assert child is not None
    task_run = run.task_run_id(task)
    run_id = child_run_id(task_run, operation)
    effects.to_run(
        run_id,
        RunRequest(
            run_id=run_id,
            workflow=child.workflow,
            input=child.input,
            metadata={**run.metadata, **child.metadata},
            priority=child.priority if child.priority is not None else run.priority,
            parent=ParentLink(task_run, operation.operation_id),
            child_index=child.child_index,
            child_key=child.child_key,
            requested_at=effects.now,
        ),
    )
    return replace(
        task, open_waits=(*task.open_waits, OpenWait(operation_id=operation.operation_id, child_run_id=run_id))
    )


def _append(
    run: Run,
    task: TaskRun,
    effects: Effects,
    *,
    operation: Operation | None = None,
    operation_id: str = "",
    result: str | None = None,
    error: TaskError | None = None,
    order: int = 0,
    position: int = 0,
) -> TaskRun:
    task_run = run.task_run_id(task)
    seq = task.log_length
    if operation is not None:
        result = json_text(operation.result)
    size = len(result.encode()) if result is not None else 0
    _check_limits(task, task_run, size)
    effects.log.append(
        LogRecord(
            id=f"{task_run}#{seq}#{effects.owner_term}",
            task_run_id=task_run,
            seq=seq,
            owner_term=effects.owner_term,
            operation_id=operation.operation_id if operation is not None else operation_id,
            kind=operation.kind if operation is not None else "done",
            at=effects.now,
            fingerprint=operation.fingerprint if operation is not None else "",
            asked=operation.asked if operation is not None else "",
            label=operation.label if operation is not None else None,
            result=result,
            error=error,
            child_run_id=(
                child_run_id(task_run, operation) if operation is not None and operation.kind == "run" else None
            ),
            order=order,
            position=position,
            version=run.version,
            retry_count=task.retry_count,
        )
    )
    segments = task.log_segments
    if not segments or segments[-1].owner_term != effects.owner_term:
        segments = (*segments, LogSegment(seq, effects.owner_term))
    return replace(task, log_length=seq + 1, log_bytes=task.log_bytes + size, log_segments=segments)


def _check_limits(task: TaskRun, task_run: str, size: int) -> None:
    if task.log_length >= limits.LOG_MAX_ENTRIES:
        raise LogFull(
            f"the durable log of {task_run} has {task.log_length} entries, the limit is {limits.LOG_MAX_ENTRIES}; "
            "move part of the work into child runs, each of which has a log of its own"
        )
    if task.log_bytes + size > limits.LOG_MAX_BYTES:
        raise LogFull(
            f"the results in the durable log of {task_run} would come to {task.log_bytes + size} bytes, "
            f"the limit is {limits.LOG_MAX_BYTES}; return references instead of large values"
        )


# --- closing --------------------------------------------------------------------------------------------------


def conditions_of(wait: OpenWait) -> list[Condition]:
    return [condition for group in wait.groups for condition in group]


def open_wait(task: TaskRun, operation_id: str) -> OpenWait | None:
    return next((wait for wait in task.open_waits if wait.operation_id == operation_id), None)


def meet(
    run: Run,
    task: TaskRun,
    operation_id: str,
    key: str,
    effects: Effects,
    *,
    seq: int,
    payload: msgspec.Raw | None = None,
) -> TaskRun:
    """A condition of a wait came true. An unknown or repeated condition changes nothing.

    ``seq`` and ``payload`` are those of the event; 0 and None for a sleep.
    """
    wait = open_wait(task, operation_id)
    if wait is None or any(met == key for met, _ in wait.met):
        return task
    condition = next((c for c in conditions_of(wait) if c.key == key), None)
    if condition is None:
        return task
    value = str(payload, "utf-8") if payload is not None else _sleep_value(condition)
    wait = replace(wait, met=(*wait.met, (key, value)), position=max(wait.position, seq))
    if not complete(wait):
        return replace(task, open_waits=tuple(wait if w.operation_id == operation_id else w for w in task.open_waits))
    _withdraw_rest(run, task, wait, effects)
    position = (
        wait.position if isinstance(condition, EventCondition) else _position_after_sleep(wait, condition, effects)
    )
    result = '{"CREATE":{' + ",".join(f"{_text(k)}:[{v}]" for k, v in wait.met) + "}}"
    return _close(run, task, operation_id, effects, position=position, result=result)


def _position_after_sleep(wait: OpenWait, condition: Condition, effects: Effects) -> int:
    """The position from which a following wait listens: the end of the sleep, even if the timer fired later.

    If this wait listened for events as well, the following one listens from the same position. An event that came
    before the sleep ended may still be under way to this shard, and both waits would miss it otherwise.
    """
    met = {key for key, _ in wait.met}
    if any(isinstance(c, EventCondition) and c.key not in met for c in conditions_of(wait)):
        return max(wait.position, wait.since)
    assert isinstance(condition, SleepCondition)
    return max(wait.position, min(effects.position, position_at(wait.asked_at + condition.duration_s)))


def child_ended(run: Run, task: TaskRun, message: ChildFinished, effects: Effects) -> TaskRun:
    """A child that an operation started has ended. An unknown child or a repeated message changes nothing."""
    wait = open_wait(task, message.operation_id)
    if wait is None or wait.child_run_id != message.child_run_id:
        return task
    result = json_text(message.output)
    position = effects.position if message.at is None else min(effects.position, position_at(message.at))
    return _close(run, task, message.operation_id, effects, position=position, result=result, error=message.error)


def _close(
    run: Run,
    task: TaskRun,
    operation_id: str,
    effects: Effects,
    *,
    position: int,
    result: str | None = None,
    error: TaskError | None = None,
) -> TaskRun:
    order = task.completed_count + 1
    task = _append(
        run, task, effects, operation_id=operation_id, result=result, error=error, order=order, position=position
    )
    task = replace(
        task, completed_count=order, open_waits=tuple(w for w in task.open_waits if w.operation_id != operation_id)
    )
    if task.lease is not None:
        done = Completion(order, raw_json(result), error, position)
        lease = ids.lease_id(run.task_run_id(task), task.invocation)
        effects.to_inbox(task.lease.inbox, OperationCompleted(lease, operation_id, done))
    return task


def complete(wait: OpenWait) -> bool:
    """Every group has a condition that came true."""
    met = {key for key, _ in wait.met}
    return all(any(condition.key in met for condition in group) for group in wait.groups)


def _withdraw_rest(run: Run, task: TaskRun, wait: OpenWait, effects: Effects) -> None:
    met = {key for key, _ in wait.met}
    for condition in conditions_of(wait):
        if condition.key not in met:
            effects.withdraw(run, task, wait.operation_id, condition)


def withdraw_all(run: Run, task: TaskRun, effects: Effects) -> None:
    """Withdraw the timers and subscriptions of a task that has ended. Its children continue to run. The waits stay in
    the state of the task, because a replay of the run arms them again."""
    for wait in task.open_waits:
        _withdraw_rest(run, task, wait, effects)


def rearm(run: Run, task: TaskRun, effects: Effects) -> None:
    """A finished task runs again: arm the waits that were open when it ended. Sleeps keep their deadlines."""
    for wait in task.open_waits:
        if wait.child_run_id is not None:
            link = ParentLink(run.task_run_id(task), wait.operation_id)
            effects.to_run(wait.child_run_id, RunRequest(wait.child_run_id, workflow="", parent=link))
        met = {key for key, _ in wait.met}
        for condition in conditions_of(wait):
            if condition.key in met:
                continue
            if isinstance(condition, SleepCondition):
                effects.set_timer(run, task, wait.operation_id, condition.key, wait.asked_at + condition.duration_s)
            else:
                effects.arm(run, task, wait.operation_id, condition, wait.since)


def can_resume(task: TaskRun) -> bool:
    """At least one branch has all results that it waits for (or no branch is known to wait)."""
    still_open = {wait.operation_id for wait in task.open_waits}
    return not task.blocked or any(still_open.isdisjoint(branch) for branch in task.blocked)


def waiting_for(task: TaskRun) -> str:
    """Why an evicted task waits: ``sleep``, ``event``, ``child`` or ``several`` (a bounded set, for metrics)."""
    reasons = set()
    for wait in task.open_waits:
        if wait.child_run_id is not None:
            reasons.add("child")
        for condition in conditions_of(wait):
            reasons.add("event" if isinstance(condition, EventCondition) else "sleep")
    return reasons.pop() if len(reasons) == 1 else "several"


def _sleep_value(condition: Condition) -> str:
    assert isinstance(condition, SleepCondition)
    return f'{{"duration_s":{condition.duration_s!r}}}'


def _text(key: str) -> str:
    return msgspec.json.encode(key).decode()


# --- reading --------------------------------------------------------------------------------------------------


def committed(task: TaskRun, records: Iterable[LogRecord]) -> list[LogRecord]:
    """The valid records, in order of seq: those whose writer also committed the run."""
    segments = task.log_segments
    valid = {}
    for entry in records:
        if entry.seq < task.log_length and entry.owner_term == _owner_term_at(segments, entry.seq):
            valid[entry.seq] = entry
    assert len(valid) == task.log_length, f"log has {len(valid)} of {task.log_length} entries"
    return [valid[seq] for seq in range(task.log_length)]


def _owner_term_at(segments: tuple[LogSegment, ...], seq: int) -> str:
    owner_term = ""
    for segment in segments:
        if segment.first > seq:
            break
        owner_term = segment.owner_term
    return owner_term


def entries_of(records: Iterable[LogRecord]) -> tuple[LogEntry, ...]:
    """The log in the form that a grant carries: one entry for each operation, with its completion."""
    operations: dict[str, LogEntry] = {}
    for entry in records:
        if entry.kind == "done":
            operations[entry.operation_id] = replace(operations[entry.operation_id], done=completion_of(entry))
        else:
            operations[entry.operation_id] = LogEntry(
                operation_id=entry.operation_id,
                kind=entry.kind,
                fingerprint=entry.fingerprint,
                asked=entry.asked,
                result=raw_json(entry.result),
                child_run_id=entry.child_run_id,
                version=entry.version,
            )
    return tuple(operations.values())


def completion_of(entry: LogRecord) -> Completion:
    return Completion(entry.order, raw_json(entry.result), entry.error, entry.position)
