"""A shard with its own store and destinations. It commits the changes of a batch, records the published messages, and
can crash between any two steps. Every commit is checked against the invariants."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import msgspec
from msgspec.structs import replace

from sublet_engine.run import durable_log
from sublet_engine.run.state import LogRecord, OutgoingMessage, Run, TaskRun
from sublet_engine.shard.counters import waiting_reason
from sublet_engine.shard.shard import Shard
from sublet_engine.shard.unit_of_work import Batch
from sublet_protocol import ids, limits
from sublet_protocol.destinations import Destination, Inbox, Pool
from sublet_protocol.messages import (
    CancelRun,
    Claim,
    Evicted,
    Failed,
    Finished,
    Goodbye,
    Grant,
    Heartbeat,
    HeldLease,
    Hello,
    LogEntry,
    NoTask,
    Record,
    RunRequest,
    ShardMessage,
    Tick,
    Ticket,
)
from sublet_protocol.raw_json import NULL
from sublet_protocol.specs import SlotKind, WorkflowSpec
from support import invariants
from support.engine_builders import NOW, POOL, error, raw, record_of

R = TypeVar("R", bound=Record)


class Sent(list[tuple[Destination, Any]]):
    """Records with their destinations."""

    def of(self, kind: type[R], to: Destination | None = None) -> list[R]:
        return [record for where, record in self if isinstance(record, kind) and to in (None, where)]


def read(messages: Iterable[OutgoingMessage]) -> Sent:
    return Sent((message.to, record_of(message)) for message in messages)


def inbox_of(worker: str) -> str:
    return f"sublet.inbox.worker.{worker}"


class Conflict(Exception):
    """Another writer has changed a run since it was loaded."""


class ShardHarness:
    """One shard that owns every run. ``handle`` is a whole batch; its parts can be had one by one."""

    def __init__(self, *flows: WorkflowSpec, now: float = NOW) -> None:
        self.now = now
        self.flows = {flow.name: flow for flow in flows}
        self.runs: dict[str, bytes] = {}
        self.log: dict[str, LogRecord] = {}
        self._workflows: dict[tuple[str, str], tuple[WorkflowSpec, float]] = {}
        self._ids = (f"id-{number}" for number in itertools.count())
        self._contested = False
        self.sent = Sent()
        """What the last batch published."""
        self.shard = self._new_shard()

    # --- a shard's life -----------------------------------------------------------------------------------------

    def handle(self, *messages: ShardMessage) -> Sent:
        """A batch: decide, commit, publish. Returns what was published."""
        self.decide(*messages)
        return self.publish(self.commit())

    def decide(self, *messages: ShardMessage) -> None:
        for run_id in sorted({run_id for message in messages if (run_id := Shard.run_needed(message)) is not None}):
            self.load(run_id)
        for message in messages:
            self.shard.handle(message, self.now)
            invariants.check_shard(self.shard)

    def load(self, run_id: str) -> None:
        if run_id not in self.shard.state.runs:
            self.shard.load(self._stored([run_id]))

    def commit(self, shard: Shard | None = None) -> Batch:
        """Write what has changed: by this shard, unless another one is given that was superseded and does not know it.

        Raises:
            Conflict: another writer was faster with at least one of the runs. The others are written.
        """
        owner = shard is None
        shard = shard or self.shard
        batch = shard.take()
        invariants.check_shard(shard)
        self._contested |= not owner
        for spec, at in batch.workflows:
            self._workflows[spec.name, spec.version] = (spec, at)
        for record in batch.log:
            self.log.setdefault(record.id, record)
        written = [self._write(before, after, shard) for before, after in batch.changes]
        if not all(written):
            raise Conflict
        if not self._contested:
            waiting = self._waiting()
            assert +shard.state.counters.waiting == waiting, (
                f"{waiting} wait, but counted are {shard.state.counters.waiting}"
            )
        return batch

    def _write(self, before: Run | None, after: Run, shard: Shard) -> bool:
        stored = self.run(after.id)
        if (before.revision if before else 0) != (stored.revision if stored else 0):
            assert self._contested, f"{after.id} is at another revision although nobody else writes"
            return False
        invariants.check_commit(stored, after, shard.workflow_of(after))
        self.runs[after.id] = msgspec.json.encode(after)
        return True

    def publish(self, batch: Batch) -> Sent:
        self.sent = read(batch.tickets)
        for item in batch.durable_grants:
            self.sent.append((Inbox(item.inbox), replace(item.grant, log=self.log_of(item.task_run_id))))
        self.sent += read(batch.messages)
        return self.sent

    def take_over(self) -> None:
        """The shard is gone with all that it had not committed; the next owner builds it again from the store."""
        self.shard = self._new_shard()

    def _new_shard(self) -> Shard:
        shard = Shard(
            owner_term=next(self._ids),
            claim_key="claims",
            shard_key="bucket.00",
            first=True,
            new_id=lambda: next(self._ids),
            now=self.now,
            shards=1,
        )
        for spec, at in self._workflows.values():
            shard.load_workflow(spec, at)
            shard.load_pool(POOL, [f"{spec.name}:{task.name}" for task in spec.tasks], at)
        shard.state.counters.waiting.update(self._waiting())
        shard.load(run for run in self._stored(self.runs) if run.live)
        return shard

    def _waiting(self) -> Counter[str]:
        tasks = [task for run in self._stored(self.runs) for task in run.tasks]
        return Counter(reason for task in tasks if (reason := waiting_reason(task)) is not None)

    # --- what is stored -----------------------------------------------------------------------------------------

    def run(self, run_id: str) -> Run | None:
        stored = self.runs.get(run_id)
        return msgspec.json.decode(stored, type=Run) if stored is not None else None

    def task(self, run_id: str, name: str = "task") -> TaskRun:
        run = self.run(run_id)
        assert run is not None, f"run {run_id} is not stored"
        return run.task(name)

    def log_of(self, task_run: str) -> tuple[LogEntry, ...]:
        records = [record for record in self.log.values() if record.task_run_id == task_run]
        task = self.task(ids.run_of(task_run), ids.task_of(task_run))
        return durable_log.entries_of(durable_log.committed(task, records))

    def _stored(self, run_ids: Iterable[str]) -> Iterator[Run]:
        return (run for run_id in list(run_ids) if (run := self.run(run_id)) is not None)

    # --- short ways ---------------------------------------------------------------------------------------------

    def request(self, run_id: str, workflow: str = "flow", **options: Any) -> Sent:
        return self.handle(RunRequest(run_id, workflow, **options))

    def hello(self, worker: str = "w1", pool: str = POOL, slots: int = 1, **options: Any) -> Sent:
        options = {"durable_slots": 1, "workflows": tuple(self.flows.values()), **options}
        return self.handle(Hello(worker, pool, "main", inbox_of(worker), slots, **options))

    def heartbeat(self, worker: str = "w1", *leases: str | HeldLease, **options: Any) -> Sent:
        return self.handle(heartbeat(worker, *leases, **options))

    def goodbye(self, worker: str = "w1") -> Sent:
        return self.handle(Goodbye(worker))

    def claim(self, ticket: str, worker: str = "w1", kind: SlotKind = "task", **options: Any) -> Grant | None:
        """The grant, or None for nothing to do."""
        sent = self.handle(claim(ticket, worker, kind, **options))
        grants = [grant for grant in sent.of(Grant) if grant.ticket == ticket]
        refusals = [nothing for nothing in sent.of(NoTask) if nothing.ticket == ticket]
        assert len(grants) + len(refusals) == 1, f"{ticket} was answered by {grants} and {refusals}"
        return grants[0] if grants else None

    def cancel(self, run_id: str) -> Sent:
        return self.handle(CancelRun(run_id))

    def finish(self, grant: Grant, output: object = None, *, next: bool = False) -> Sent:
        return self.handle(finished(grant, output, next=next))

    def tick(self, by_s: float = 1.0) -> Sent:
        """Time passes, a second at a time; returns what was published meanwhile."""
        meanwhile = Sent()
        until = self.now + by_s
        while self.now < until:
            self.now = min(self.now + limits.TICK_INTERVAL_S, until)
            meanwhile += self.handle(Tick(self.now))
        self.sent = meanwhile
        return meanwhile

    def tickets(self, pool: str | None = None, kind: SlotKind = "task") -> list[str]:
        """Those issued by the last batch."""
        return [ticket.id for ticket in self.sent.of(Ticket, Pool(pool or POOL, kind))]

    def granted(self, run_id: str, worker: str = "w1", ticket: str | None = None, **options: Any) -> Grant:
        """A new run, claimed by a worker under its ticket."""
        self.request(run_id, **options)
        grant = self.claim(ticket or self.tickets()[0], worker)
        assert grant is not None
        return grant


# --- messages of workers ----------------------------------------------------------------------------------------


def claim(ticket: str, worker: str = "w1", kind: SlotKind = "task", pool: str = POOL, **options: Any) -> Claim:
    return Claim(ticket, worker, pool, kind, inbox_of(worker), **options)


def heartbeat(worker: str = "w1", *leases: str | HeldLease, pool: str = POOL, **options: Any) -> Heartbeat:
    options = {"slots": 1, "durable_slots": 1, **options}
    held = tuple(lease if isinstance(lease, HeldLease) else HeldLease(lease) for lease in leases)
    return Heartbeat(worker, pool, inbox_of(worker), leases=held, **options)


def finished(grant: Grant, output: object = None, *, next: bool = False) -> Finished:
    return Finished(grant.lease, grant.ticket, raw(output) if output is not None else NULL, next=next)


def failed(grant: Grant, *, next: bool = False, retryable: bool = True) -> Failed:
    return Failed(grant.lease, grant.ticket, error(), next=next, retryable=retryable)


def evicted(grant: Grant, *operations: Any, next: bool = False) -> Evicted:
    blocked = tuple((operation.operation_id,) for operation in operations if operation.kind != "memo")
    return Evicted(grant.lease, grant.ticket, operations, blocked, 0, next=next)
