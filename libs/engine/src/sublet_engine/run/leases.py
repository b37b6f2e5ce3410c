"""Leases: the right of one worker to run one invocation. A lease is granted once and ends once. A report under a lease
that has ended changes nothing."""

from __future__ import annotations

import msgspec
from msgspec.structs import replace

from sublet_engine.run.effects import position_at
from sublet_engine.run.state import Lease, Run, TaskRun
from sublet_protocol import ids
from sublet_protocol.messages import Grant
from sublet_protocol.raw_json import raw_json
from sublet_protocol.specs import WorkflowSpec


def grant(
    run: Run, name: str, workflow: WorkflowSpec, *, worker: str, inbox: str, pool: str, ticket: str, now: float
) -> Run:
    """Give a READY task to a worker. ``now``: Unix seconds."""
    task = run.task(name)
    assert task.status == "READY", f"{run.task_run_id(task)} is {task.status}"
    left = max(workflow.task(name).execution_timeout_s + task.timeout_bonus_s - task.active_s, 0.0)
    lease = Lease(
        worker=worker,
        inbox=inbox,
        pool=pool,
        ticket=ticket,
        granted_at=now,
        deadline=now + left,
        active_left_s=left,
    )
    task = replace(
        task,
        status="RUNNING",
        lease=lease,
        invocation=task.invocation + 1,
        reports=0,
        schedule_deadline=None,
        blocked=(),
        started_at=task.started_at if task.started_at is not None else now,
        evicted_at=None,
    )
    run = run.with_task(task)
    if run.status == "QUEUED":
        run = replace(run, status="RUNNING", started_at=now)
    return run


def holder(run: Run, lease: str) -> TaskRun | None:
    """The task that runs under this lease; None if the lease has ended."""
    for task in run.tasks:
        if task.lease is not None and ids.lease_id(run.task_run_id(task), task.invocation) == lease:
            return task
    return None


def grant_message(run: Run, task: TaskRun, workflow: WorkflowSpec, now: float, *, claim_key: str, shards: int) -> Grant:
    """The message that lets the worker run a task under its lease. The caller adds the durable log from the store."""
    assert task.lease is not None
    spec = workflow.task(task.name)
    outputs = {name: run.task(name).output for name in spec.dependencies}
    deadline = task.lease.deadline if task.lease.deadline is not None else now + task.lease.active_left_s
    return Grant(
        ticket=task.lease.ticket,
        lease=ids.lease_id(run.task_run_id(task), task.invocation),
        workflow=run.workflow,
        version=run.version,
        task=task.name,
        input=msgspec.Raw(run.input),
        retry_count=task.retry_count,
        invocation=task.invocation,
        timeout_s=max(deadline - now, 0.0),
        metadata=run.metadata,
        priority=run.priority,
        parents={name: raw_json(output) for name, output in outputs.items()},
        skipped=tuple(name for name in spec.dependencies if run.task(name).status == "SKIPPED"),
        errors={t.name: t.error for t in run.tasks if t.status == "FAILED" and t.error} if spec.on_failure else {},
        position=position_at(run.created_at),
        parent=run.parent,
        child_index=run.child_index,
        child_key=run.child_key,
        trigger=run.trigger,
        claim_key=claim_key,
        shards=shards,
    )


def release(run: Run, lease: str) -> Run:
    """The task has released its slot; its lease continues."""
    task = holder(run, lease)
    if task is None or task.lease is None or task.lease.released:
        return run
    return run.with_task(replace(task, lease=replace(task.lease, released=True, ticket="")))


def extend(run: Run, lease: str, by_s: float, number: int) -> Run:
    """Add ``by_s`` seconds to the execution timeout. ``number``: that of the report, so that it is applied once."""
    task = holder(run, lease)
    if task is None or task.lease is None or number <= task.reports:
        return run
    held = task.lease
    held = replace(
        held,
        active_left_s=held.active_left_s + by_s,
        deadline=held.deadline + by_s if held.deadline is not None else None,
    )
    return run.with_task(replace(task, lease=held, reports=number, timeout_bonus_s=task.timeout_bonus_s + by_s))


def clock(lease: Lease, waiting: bool, now: float) -> Lease:
    """The lease with its execution clock stopped (``waiting``) or running. ``now``: Unix seconds."""
    if waiting and lease.deadline is not None:
        return replace(lease, deadline=None, active_left_s=max(lease.deadline - now, 0.0))
    if not waiting and lease.deadline is None:
        return replace(lease, deadline=now + lease.active_left_s)
    return lease
