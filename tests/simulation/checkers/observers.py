"""Checks while the system runs: messages at the broker, commits, and the slots that bodies take."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from simulation.checkers.slots import Delivery, SlotWatch
from simulation.scenarios.plan import WorkerPlan
from simulation.system.processes import Process
from sublet_engine.run.state import OpenWait, OutgoingMessage, Run
from sublet_platform.memory.cluster import Message, Subscription
from sublet_protocol import ids
from sublet_protocol.destinations import Ingest, Timer
from sublet_protocol.messages import (
    ChildFinished,
    Claim,
    Evicted,
    Failed,
    Finished,
    Grant,
    GrantDeclined,
    NoTask,
    Recorded,
    ReplayRun,
    Revoked,
    RunResult,
    SetTimer,
    SlotReleased,
    TimerFired,
    decode_for_client,
    decode_for_shard,
    decode_for_timer,
    decode_for_worker,
    decode_ticket,
)
from sublet_protocol.topology import EVENTS, INBOXES, REQUESTS, TIMERS
from support import invariants

if TYPE_CHECKING:
    from simulation.system.simulated_system import SimulatedSystem

WORKER_INBOX = "sublet.inbox.worker."
SHARD_INBOX = "sublet.inbox.shard."
CLIENT_INBOX = "sublet.inbox.client."
POOL_QUEUE = "sublet.pool."


class Observers:
    """``waits``: every wait that was ever stored as open, by task run and operation id. ``replayed``: runs for which a
    replay was requested. ``published``: the ids of all events."""

    def __init__(self, system: SimulatedSystem) -> None:
        self._system = system
        self.waits: dict[tuple[str, str], OpenWait] = {}
        self.replayed: set[str] = set()
        self.published: set[str] = set()
        self.sent_count = self.received_count = self.acked_count = 0
        self._due: dict[str, float] = {}
        self._withdrawn: set[str] = set()
        self._slots: dict[Process, WorkerPlan] = {}
        self._granted_to: dict[str, str] = {}
        self._slot_watch = SlotWatch(system.report_violation)

    # --- messages -----------------------------------------------------------------------------------------------

    def sent(self, sender: Process, message: Message) -> None:
        self.sent_count += 1
        if self._system.verbose:
            self._system.note(f"{sender.name} sends {_summary(message)}")
        if message.exchange == REQUESTS:
            self._sent_to_shard(sender, message)
        elif message.exchange == INBOXES and message.routing_key.startswith(WORKER_INBOX):
            self._sent_to_worker(message)
        elif message.exchange == INBOXES and message.routing_key.startswith(SHARD_INBOX):
            self._sent_to_shard(sender, message)
        elif message.exchange == INBOXES and message.routing_key.startswith(CLIENT_INBOX):
            self._sent_to_client(message)
        elif message.exchange == EVENTS and message.message_id is not None:
            self.published.add(message.message_id)
        elif message.routing_key == TIMERS and message.body.startswith(b'[{"t"'):
            for record in decode_for_timer(message.body):
                if isinstance(record, SetTimer):
                    self._due[record.id] = min(record.due, self._due.get(record.id, record.due))

    def _sent_to_shard(self, sender: Process, message: Message) -> None:
        if not message.body.startswith(b'[{"t"') or message.routing_key == "query":
            return
        for record in decode_for_shard(message.body):
            if isinstance(record, Recorded | Evicted):
                memos = (bytes(operation.result) for operation in record.operations if operation.kind == "memo")
                self._system.history.memos_sent.update(int(value) for value in memos if value.isdigit())
            match record:
                case Finished() | Failed() | Evicted() | SlotReleased() | GrantDeclined():
                    self._slot_watch.reported(record)
                case Claim():
                    self._slot_watch.claimed(sender, record.ticket, record.redelivered)
                case TimerFired():
                    due = self._due.get(ids.wait_id(record.task_run_id, record.operation_id, record.key))
                    if due is None or sender.clock.now() < due - self._system.plan.jumps_s:
                        self._system.report_violation(f"{sender.name} fired {record} although it is due at {due}")
                case ChildFinished():
                    self._check_announced_end(record.child_run_id, record.status)
                case ReplayRun():
                    self.replayed.add(record.run_id)
                case _:
                    pass

    def _sent_to_worker(self, message: Message) -> None:
        for record in decode_for_worker(message.body):
            if isinstance(record, Grant):
                first = self._granted_to.setdefault(record.lease, message.routing_key)
                if first != message.routing_key:
                    self._system.report_violation(f"{record.lease} was granted to {first} and to {message.routing_key}")

    def _sent_to_client(self, message: Message) -> None:
        for record in decode_for_client(message.body):
            if isinstance(record, RunResult) and record.status is not None:
                self._check_announced_end(record.run_id, record.status)

    def _check_announced_end(self, run_id: str, status: str) -> None:
        """A message says how a run ended: the same must be in the database already."""
        run = self._system.database.runs.get(run_id)
        stored = run.status if run is not None else "unknown"
        if stored != status and run_id not in self.replayed:
            self._system.report_violation(f"a message says that run {run_id} is {status}, but {stored} is stored")

    def received(self, receiver: Process, subscription: Subscription, tag: int, message: Message) -> None:
        self.received_count += 1
        if self._system.verbose:
            again = " again" if message.redelivered else ""
            self._system.note(f"{receiver.name} receives{again} {_summary(message)}")
        if message.routing_key.startswith(POOL_QUEUE):
            delivery = Delivery(subscription, tag, message.redelivered)
            self._slot_watch.delivered(receiver, decode_ticket(message.body).id, delivery)
        elif message.routing_key.startswith(WORKER_INBOX):
            for record in decode_for_worker(message.body):
                if isinstance(record, NoTask):
                    self._slot_watch.no_task(receiver, record.ticket)
                elif isinstance(record, Grant):
                    self._slot_watch.granted(receiver, record.ticket, record.lease)
                elif isinstance(record, Revoked):
                    self._slot_watch.revoked(record.lease)

    def acked(self, sender: Process, ticket: Any) -> None:
        self.acked_count += 1
        if self._system.verbose:
            self._system.note(f"{sender.name} acknowledges ticket {decode_ticket(ticket.body).id}")
        self._slot_watch.acknowledged(sender, Delivery(ticket.channel, ticket.tag, ticket.redelivered))

    # --- commits ------------------------------------------------------------------------------------------------

    def committed(self, before: Run | None, after: Run) -> None:
        record = self._system.database.workflows.get((after.workflow, after.version))
        try:
            invariants.check_commit(before, after, record.spec if record is not None else None)
        except AssertionError as error:
            self._system.report_violation(f"commit: {error}")
        if before is not None and before.terminal and after.id not in self.replayed:
            self._check_end_is_final(before, after)
        self._check_withdrawn_requests(before.outbox if before is not None else (), after.outbox)
        for task in after.tasks:
            for wait in task.open_waits:
                self.waits.setdefault((after.task_run_id(task), wait.operation_id), wait)

    def _check_end_is_final(self, before: Run, after: Run) -> None:
        if (before.status, before.tasks, before.finished_at) != (after.status, after.tasks, after.finished_at):
            self._system.report_violation(
                f"run {before.id} had ended as {before.status}, and changed to {after.status}"
            )

    def _check_withdrawn_requests(self, before: Sequence[OutgoingMessage], after: Sequence[OutgoingMessage]) -> None:
        """A withdrawn timer or subscription is never requested again: a late message could withdraw it once more."""
        for item in after:
            if item in before or not isinstance(item.to, Timer | Ingest):
                continue
            record = json.loads(item.body)
            if record["t"] in ("unsubscribe", "cancel_timer"):
                self._withdrawn.add(record["id"])
            elif record["id"] in self._withdrawn:
                self._system.report_violation(f"{record['id']} is requested again although it was withdrawn")

    # --- slots --------------------------------------------------------------------------------------------------

    def joined(self, process: Process, plan: WorkerPlan) -> None:
        self._slots[process] = plan

    def started(self, process: Process, durable: bool) -> None:
        plan = self._slots[process]
        slots = plan.durable_slots if durable else plan.slots
        busy = self._system.history.busy(process, durable)
        if busy > slots:
            kind = "durable" if durable else "ordinary"
            self._system.report_violation(f"{process.name} runs {busy} {kind} tasks in {slots} slots")


def _summary(message: Message) -> str:
    """One line about a message, for the story."""
    address = message.routing_key or message.exchange
    try:
        body = json.loads(message.body)
    except ValueError:
        return f"{message.body[:40]!r} to {address}"
    records = body if isinstance(body, list) else [body]
    return f"to {address}: " + ", ".join(_summary_of_record(record) for record in records)


def _summary_of_record(record: dict[str, Any]) -> str:
    kind = record.get("t", "event")
    shown = (
        "ticket",
        "lease",
        "worker",
        "task_run_id",
        "operation_id",
        "run_id",
        "status",
        "id",
        "next",
        "due",
        "n",
        "flush",
    )
    parts = [f"{name}={record[name]}" for name in shown if record.get(name)]
    return f"{kind}({', '.join(parts)})"
