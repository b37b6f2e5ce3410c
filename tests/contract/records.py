"""Records for the contract tests of the stores, with every field filled."""

from __future__ import annotations

import msgspec

from sublet_engine.run.state import Lease, LogRecord, LogSegment, OpenWait, OutgoingMessage, Run, TaskRun
from sublet_protocol import ids
from sublet_protocol.destinations import Bucket, Inbox, Ingest, Timer
from sublet_protocol.messages import ParentLink, TaskError, Trigger
from sublet_protocol.specs import EventCondition, EventFilter, ParentCondition, SleepCondition, TaskSpec, WorkflowSpec

AWKWARD: dict[str, object] = {
    "plain": "text",
    "with.dot": 1,
    "$dollar": {"$gt": {"a.b": None}},
    "": "empty key",
    "huge": 10**30,
    "negative": -(2**63) - 1,
    "list": [1, 2.5, None, True, {"deep": {"er": []}}],
    "ünïcode": "\u0000\U0001f600",
    "_id": "mine",
}
"""JSON that a document database may reject."""

ERROR = TaskError("ValueError", "no such order", "Traceback …", "r.t")


def a_run(run_id: str = "run-1", **fields: object) -> Run:
    run = Run(
        id=run_id, workflow="w", version="1", input="{}", created_at=1_700_000_000.0, revision=1, owner_term="e-1"
    )
    return msgspec.structs.replace(run, **fields)


def a_live_run(run_id: str, **fields: object) -> Run:
    return a_run(run_id, tasks=(TaskRun("t", status="READY"),), **fields)


def a_full_run(run_id: str = "full") -> Run:
    """A run in which no field has its default."""
    return Run(
        id=run_id,
        workflow="orders.process",
        version="0123456789ab",
        input='{"order": 42}',
        created_at=1_700_000_000.25,
        tasks=(TaskRun("empty"), a_full_task()),
        status="RUNNING",
        metadata=AWKWARD,
        priority=3,
        parents=(ParentLink("p.t", "3"), ParentLink("q.t", "t1.2")),
        parent=ParentLink("p.t", "3"),
        child_index=7,
        child_key="seven",
        trigger=Trigger("event-1", "order.paid", {"a.b": {"$in": [10**25]}}),
        watchers=("sublet.inbox.client.1",),
        error=ERROR,
        cancelled_reason="because",
        started_at=1_700_000_001.5,
        finished_at=1_700_000_002.5,
        outbox=(
            OutgoingMessage(Bucket(7), b'{"t":"child_finished"}'),
            OutgoingMessage(Timer(), b'{"t":"set_timer"}'),
            OutgoingMessage(Ingest(), b'{"t":"subscribe"}'),
            OutgoingMessage(Inbox("sublet.inbox.client.1"), b'{"t":"run_result"}'),
        ),
        revision=1,
        owner_term="e-1",
    )


def a_full_task() -> TaskRun:
    return TaskRun(
        name="charge",
        status="RUNNING",
        retry_count=2,
        replays=1,
        retries_used=1,
        losses=1,
        invocation=5,
        lease=Lease(
            worker="w-1",
            inbox="sublet.inbox.worker.w-1",
            pool="p-12345678",
            ticket="t-1",
            granted_at=1_700_000_001.0,
            deadline=1_700_000_061.0,
            active_left_s=59.5,
            released=True,
        ),
        resumed=True,
        ready_at=1_700_000_000.5,
        schedule_deadline=1_700_000_300.5,
        active_s=0.5,
        timeout_bonus_s=10.0,
        open_waits=(
            OpenWait(
                operation_id="t1.2",
                groups=((SleepCondition("s", 5.0), EventCondition("e", "order.paid", "input.a == 1", "acme", 1.0)),),
                met=(("s", "{}"),),
                since=1_700_000_000_000_000,
                child_run_id="child",
                position=1_700_000_000_000_001,
            ),
            OpenWait(operation_id="2", groups=((ParentCondition("p", "a", "output.b"),),)),
        ),
        blocked=(("1", "2"), ("t1.2",)),
        delivered=3,
        completed_count=4,
        log_length=6,
        log_bytes=1_234,
        log_segments=(LogSegment(0, "e-0"), LogSegment(4, "e-1")),
        met=("wait/0/s",),
        armed=True,
        output='{"ok": true}',
        error=ERROR,
        reason="skipped by condition",
        queued_at=1.0,
        started_at=2.0,
        evicted_at=3.0,
        finished_at=4.0,
    )


def a_log_record(task_run: str, seq: int, owner_term: str = "e-1", **fields: object) -> LogRecord:
    record = LogRecord(
        id=f"{task_run}/{seq}/{owner_term}",
        task_run_id=task_run,
        seq=seq,
        owner_term=owner_term,
        operation_id=str(seq),
        kind="wait",
        at=1_700_000_000.0 + seq,
    )
    return msgspec.structs.replace(record, **fields)


def a_workflow(name: str = "w", version: str = "1") -> WorkflowSpec:
    task = TaskSpec("t", wait_for=((SleepCondition("s", 1.0),), (EventCondition("e", "paid"),)))
    filters = (EventFilter("input.a == payload.b", "acme", AWKWARD),)
    return WorkflowSpec(name, (task,), version, on_events=("order.*",), default_filters=filters, label="first")


def run_ids_in_buckets(count: int) -> dict[int, str]:
    """One run id for each of the first ``count`` buckets."""
    found: dict[int, str] = {}
    number = 0
    while len(found) < count:
        run_id = f"run-{number}"
        if ids.bucket_of(run_id) < count:
            found.setdefault(ids.bucket_of(run_id), run_id)
        number += 1
    return found
