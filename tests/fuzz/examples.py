"""One valid message of each kind: what mutations begin with."""

from __future__ import annotations

import msgspec

from sublet_protocol import messages as m
from sublet_protocol.specs import (
    EventCondition,
    EventFilter,
    ParentCondition,
    SleepCondition,
    TaskSpec,
    WorkflowSpec,
)

RUN = "00000000-0000-4000-8000-000000000001"
TASK_RUN = f"{RUN}.t"
LEASE = f"{TASK_RUN}@1"
RAW = msgspec.Raw(b'{"n":1}')
WAIT = EventCondition("c", "paid", "input.a == 1 && input.b > 2", "s", 1.5)
SPEC = WorkflowSpec(
    "flow",
    (
        TaskSpec("t", durable=True, retries=1, backoff_factor=2.0, backoff_max_s=9.0),
        TaskSpec("u", parents=("t",), wait_for=((SleepCondition("z", 1.0), WAIT),)),
        TaskSpec("v", skip_if=((ParentCondition("p", "t", "output.n == 1"),),)),
        TaskSpec("w", on_failure=True),
    ),
    "v1",
    ("paid", "pa*"),
    (EventFilter("input.a == payload.a", "s", {"a": 1}),),
)
ERROR = m.TaskError("E", "text", "trace", TASK_RUN)
DONE = m.Completion(1, RAW, ERROR, 5)
OPERATION = m.Operation("1", "wait", "f", "asked", "label", ((WAIT, SleepCondition("z", 1.0)),), 1)
CHILD = m.Operation("2", "run", "f", "asked", child=m.ChildRequest("flow", RAW, {"k": 1}, 2, "key", 1), result=RAW)

TO_SHARD: tuple[m.Record, ...] = (
    m.RunRequest(
        RUN, "flow", RAW, {"k": 1}, 2, "inbox", m.ParentLink(TASK_RUN, "1"), True, 1, "key", m.Trigger("e", "paid"), 1.0
    ),
    m.WatchRun(RUN, "inbox"),
    m.CancelRun(RUN, TASK_RUN, "inbox", "correlation"),
    m.ReplayRun(RUN, "inbox", "correlation"),
    m.TimerFired(TASK_RUN, "1", "z"),
    m.EventMatched(TASK_RUN, "1", "c", "event", 7, RAW),
    m.ChildFinished(TASK_RUN, "1", RUN, "COMPLETED", RAW, m.TaskError("E", "text"), 1.0),
    m.Tick(1.0),
    m.Hello("worker", "pool", "name", "inbox", 1, 1, (SPEC,), 1.0, {"l": 1}),
    m.Heartbeat("worker", "pool", "inbox", 1, 1, (m.HeldLease(LEASE, 0),), True),
    m.Goodbye("worker"),
    m.Claim("ticket", "worker", "pool", "durable", "inbox", True),
    m.Finished(LEASE, "ticket", RAW, True),
    m.Failed(LEASE, "ticket", m.TaskError("E", "text"), False, True),
    m.Evicted(LEASE, "ticket", (OPERATION, CHILD), (("1",),), 0, 1.0, "waiting", True),
    m.Recorded(LEASE, (OPERATION,), True, 1.0, 1),
    m.SlotReleased(LEASE),
    m.TimeoutExtended(LEASE, 1.0, 1),
    m.GrantDeclined(LEASE, "ticket"),
)
TO_WORKER: tuple[m.Record, ...] = (
    m.Grant(
        "ticket", LEASE, "flow", "v1", "t", RAW, 0, 1, 60.0, parents={"p": RAW}, skipped=("v",), errors={"w": ERROR},
        log=(m.LogEntry("1", "wait", "f", "asked", RAW, DONE, RUN, "v1"),), parent=m.ParentLink(TASK_RUN),
    ),
    m.NoTask("ticket"),
    m.OperationCompleted(LEASE, "1", DONE),
    m.Revoked(LEASE, "cancelled"),
    m.Ping(True),
)  # fmt: skip
TO_CLIENT: tuple[m.Record, ...] = (
    m.RunResult(RUN, "FAILED", {"t": RAW}, (m.TaskError("E", "text"),), "reason"),
    m.Reply("correlation", RAW, "error"),
)
TO_TIMER: tuple[m.Record, ...] = (m.SetTimer("timer", 1.0, TASK_RUN, "1", "z"), m.CancelTimer("timer"))
TO_INGEST: tuple[m.Record, ...] = (
    m.Subscribe("wait", TASK_RUN, "1", WAIT, 5),
    m.Unsubscribe("wait"),
    m.RegisterTriggers("flow", ("paid", "pa*"), SPEC.default_filters, 1.0),
)
QUERIES: tuple[m.Record, ...] = tuple(
    m.Query("correlation", "inbox", kind, msgspec.Raw(arguments))
    for kind, arguments in (
        ("run", b'{"run_id":"%s"}' % RUN.encode()),
        ("runs", b'{"since":1.0,"until":9e9,"statuses":["QUEUED"],"workflows":["flow"],"metadata":{"k":1},"limit":10}'),
        ("why", b'{"run_id":"%s"}' % RUN.encode()),
        ("log", b'{"task_run_id":"%s"}' % TASK_RUN.encode()),
        ("workflows", b"{}"),
        ("workers", b"{}"),
    )
)
TICKET = m.encode_one(m.Ticket("ticket", "scheduler", "bucket.00"))
EVENTS = (
    b'{"a":1,"b":3,"s":"text","l":[1,2,3],"o":{"n":1.5,"deep":[{"x":null}]}}',
    b"{}",
)
EXPRESSIONS = (
    b"input.a == 1 && input.b > 2",
    b"input.l.exists(x, x == input.a) || input.o.deep.all(d, has(d.x))",
    b"input.s.matches('^[a-z]{2,5}$') && input.l.map(x, x * 2).filter(y, y > 2).size() == 1",
    b'(input["a"] == 1.0) && true',
)


def bodies(records: tuple[m.Record, ...]) -> tuple[bytes, ...]:
    """Each alone, and all together."""
    return *(m.encode([record]) for record in records), m.encode(records)
