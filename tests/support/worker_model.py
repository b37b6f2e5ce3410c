"""A worker as the protocol wants it, in the plainest form; and the workflows that it knows."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from msgspec.structs import replace

from sublet_protocol.messages import (
    Claim,
    Evicted,
    Failed,
    Finished,
    Grant,
    GrantDeclined,
    Heartbeat,
    HeldLease,
    Hello,
    NoTask,
    Operation,
    OperationCompleted,
    Ping,
    Record,
    Recorded,
    Revoked,
    ShardMessage,
    SlotReleased,
)
from sublet_protocol.specs import SlotKind, TaskSpec
from support.engine_builders import POOL, both, either, error, event, parent, raw, run_op, sleep, wait_op, workflow
from support.shard_harness import inbox_of

SLOTS: Mapping[SlotKind, int] = {"task": 2, "durable": 2}
EVENTS = ("paid", "sent")

FLOWS = (
    workflow(TaskSpec("task", retries=1), name="plain"),
    workflow(TaskSpec("task", retries=1, backoff_factor=3, execution_timeout_s=5), name="patient"),
    workflow(TaskSpec("task", schedule_timeout_s=15), name="hurried"),
    workflow(
        "a",
        TaskSpec("b", parents=("a",), wait_for=either(sleep(3), event("paid"))),
        TaskSpec("c", parents=("a",), skip_if=both(parent("a", "output.number % 2 == 0"))),
        TaskSpec("d", parents=("b", "c"), retries=1),
        TaskSpec("rescue", on_failure=True),
        name="dag",
    ),
    workflow(TaskSpec("task", durable=True, retries=1), name="durable"),
)

STAGES: tuple[tuple[Operation, ...], ...] = (
    (wait_op("0", sleep(2)),),
    (wait_op("1", either(sleep(20), event("paid"))),),
    (wait_op("t0.0", sleep(4)), run_op("t1.0", "plain"), wait_op("t2.0", both(event("paid"), event("sent")))),
    (wait_op("2", sleep(0)),),
    (run_op("3", "patient"),),
)
"""What the code of the durable task does: it asks for each stage at once, and needs all of it to go on."""


@dataclass
class Execution:
    """A task that runs. ``ticket`` None: it has lost or released it. ``done``: orders of the operations whose end the
    code knows, by node."""

    grant: Grant
    ticket: str | None
    asked: set[str]
    done: dict[str, int]
    released: bool = False
    reports: int = 0

    @property
    def kind(self) -> SlotKind:
        return "durable" if self.grant.workflow == "durable" else "task"

    def stage(self) -> tuple[Operation, ...]:
        """What the code waits for; nothing at its end."""
        return next((stage for stage in STAGES if not self.done.keys() >= {op.operation_id for op in stage}), ())

    def delivered(self) -> int:
        """The highest order up to which the code knows every result."""
        orders = set(self.done.values())
        return next(order for order in range(len(orders) + 1) if order + 1 not in orders)

    def news(self) -> tuple[Operation, ...]:
        """Operations to be recorded."""
        new = tuple(operation for operation in self.stage() if operation.operation_id not in self.asked)
        self.asked.update(operation.operation_id for operation in new)
        return tuple(replace(operation, since=self._position()) for operation in new)

    def blocked(self) -> tuple[tuple[str, ...], ...]:
        return tuple((operation.operation_id,) for operation in self.stage() if operation.operation_id not in self.done)

    def _position(self) -> int:
        ends = [entry.done.position for entry in self.grant.log if entry.done is not None]
        return max(ends, default=self.grant.position)


@dataclass
class WorkerModel:
    """Its reports count as confirmed once they are given to its lane. Methods return reports, and a ticket to claim."""

    name: str
    inbox: deque[Record] = field(default_factory=deque)
    held: dict[str, SlotKind] = field(default_factory=dict)
    """Tickets that were delivered and not acknowledged."""
    adopted: dict[str, SlotKind] = field(default_factory=dict)
    """Tickets that stand for tasks which lost theirs: they are not claimed before one of those ends."""
    executions: dict[str, Execution] = field(default_factory=dict)
    leaving: bool = False
    _redelivered: set[str] = field(default_factory=set)
    _over: set[str] = field(default_factory=set)

    # --- tickets ------------------------------------------------------------------------------------------------

    def room(self, kind: SlotKind) -> int:
        """How many more tickets RabbitMQ would give it."""
        taken = (*self.held.values(), *self.adopted.values())
        return 0 if self.leaving else SLOTS[kind] - taken.count(kind)

    def take(self, ticket: str, kind: SlotKind, *, redelivered: bool) -> str | None:
        if redelivered:
            self._redelivered.add(ticket)
        orphans = [e for e in self.executions.values() if e.kind == kind and e.ticket is None and not e.released]
        if len(orphans) > list(self.adopted.values()).count(kind):
            self.adopted[ticket] = kind
            return None
        self.held[ticket] = kind
        return ticket

    def idle_tickets(self) -> list[str]:
        serving = {execution.ticket for execution in self.executions.values()}
        return [ticket for ticket in self.held if ticket not in serving]

    def lose_connection(self) -> None:
        self.held.clear()
        self.adopted.clear()
        self.inbox.clear()
        for execution in self.executions.values():
            execution.ticket = None

    def _free(self, execution: Execution) -> str | None:
        """Its slot is free: acknowledge, or use the ticket that stood for it."""
        if execution.released:
            return None
        if execution.ticket is not None:
            del self.held[execution.ticket]
            return None
        ticket = next((ticket for ticket, kind in self.adopted.items() if kind == execution.kind), None)
        if ticket is not None:
            self.held[ticket] = self.adopted.pop(ticket)
        return ticket

    # --- messages -----------------------------------------------------------------------------------------------

    def hello(self) -> Hello:
        return Hello(self.name, POOL, "main", inbox_of(self.name), SLOTS["task"], SLOTS["durable"], FLOWS)

    def heartbeat(self) -> Heartbeat:
        leases = tuple(
            HeldLease(lease, execution.delivered() if execution.kind == "durable" else -1)
            for lease, execution in self.executions.items()
        )
        room = SLOTS["task"], SLOTS["durable"]
        return Heartbeat(self.name, POOL, inbox_of(self.name), *room, leases, draining=self.leaving)

    def claim(self, ticket: str) -> Claim:
        again = ticket in self._redelivered
        return Claim(ticket, self.name, POOL, self.held[ticket], inbox_of(self.name), redelivered=again)

    def receive(self, message: Record) -> tuple[list[ShardMessage], str | None]:
        match message:
            case Grant():
                return self._granted(message), None
            case NoTask():
                if message.ticket in self.idle_tickets():
                    del self.held[message.ticket]
            case OperationCompleted():
                execution = self.executions.get(message.lease)
                if execution is not None:
                    execution.done[message.operation_id] = message.done.order
            case Revoked():
                self._over.add(message.lease)
                if message.lease in self.executions:
                    return [], self._free(self.executions.pop(message.lease))
            case Ping():
                return [*([self.hello()] if message.hello else []), self.heartbeat()], None
        return [], None

    def _granted(self, grant: Grant) -> list[ShardMessage]:
        if grant.lease in self.executions or grant.lease in self._over:
            return []
        if self.leaving or grant.ticket not in self.idle_tickets():
            self._over.add(grant.lease)
            return [GrantDeclined(grant.lease, grant.ticket)]
        asked = {entry.operation_id for entry in grant.log}
        done = {entry.operation_id: entry.done.order for entry in grant.log if entry.done is not None}
        self.executions[grant.lease] = Execution(grant, grant.ticket, asked, done)
        return []

    # --- code ---------------------------------------------------------------------------------------------------

    def act(self, lease: str, choice: str, *, more: bool, number: int) -> tuple[list[ShardMessage], str | None]:
        """``choice``: go on, stay (durable: do not leave while waiting), fail, or release. ``more``: ask for the next
        task under the same ticket."""
        execution = self.executions[lease]
        if choice == "release":
            return self._release(execution), None
        if choice == "stay" and execution.kind == "durable" and execution.stage():
            execution.reports += 1
            return [Recorded(lease, execution.news(), waiting=True, number=execution.reports)], None
        more = more and execution.ticket is not None and not self.leaving
        report = self._end(execution, choice, number, more)
        del self.executions[lease]
        self._over.add(lease)
        return [report], None if more else self._free(execution)

    def _end(self, execution: Execution, choice: str, number: int, more: bool) -> ShardMessage:
        lease, ticket = execution.grant.lease, execution.ticket
        if choice == "fail":
            return Failed(lease, ticket, error(), next=more)
        if execution.kind == "durable" and execution.stage():
            news, blocked = execution.news(), execution.blocked()
            return Evicted(lease, ticket, news, blocked, execution.delivered(), next=more)
        return Finished(lease, ticket, raw({"number": number}), next=more)

    def _release(self, execution: Execution) -> list[ShardMessage]:
        if execution.ticket is None:
            return []
        del self.held[execution.ticket]
        execution.ticket, execution.released = None, True
        return [SlotReleased(execution.grant.lease)]
