"""Deliberate mistakes in the engine, the services and the worker, to prove that the checkers notice each of them.

A mutation is a context manager. While it is entered, one guarantee is broken everywhere.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

from msgspec.structs import replace

from sublet._durable.invocation import DurableInvocation
from sublet._worker.runner import Runner
from sublet._worker.tickets import Tickets
from sublet_engine.run import durable_log, leases, transitions
from sublet_engine.shard.shard import Shard
from sublet_engine.shard.tickets import Tickets as ShardTickets
from sublet_engine.timer.horizon import Horizon
from sublet_event_ingest.ingest import Ingest
from sublet_platform.batching import BatchLoop
from sublet_platform.memory import MemoryEventStore, MemoryRunStore
from sublet_platform.ports import RunChange
from sublet_protocol import ids
from sublet_scheduler.shard_service import ShardService
from sublet_timer.service import TimerService

Mutation = Callable[[], AbstractContextManager[Any]]


def acknowledge_before_the_confirm() -> AbstractContextManager[Any]:
    """A worker does not wait for the broker's confirms of its reports."""
    report = Runner.report

    def report_without_waiting(self: Runner, *args: Any) -> asyncio.Future[None]:
        report(self, *args)
        confirmed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        confirmed.set_result(None)
        return confirmed

    return patch.object(Runner, "report", report_without_waiting)


def acknowledge_before_handling() -> AbstractContextManager[Any]:
    """A service acknowledges messages before it has handled them."""
    attempt = BatchLoop._attempt

    async def acknowledge_and_attempt(self: BatchLoop, batch: Any) -> None:
        self._broker.ack(batch)
        await attempt(self, batch)

    return patch.object(BatchLoop, "_attempt", acknowledge_and_attempt)


def drop_the_revision_check() -> AbstractContextManager[Any]:
    """The last writer wins."""

    async def commit(self: Any, changes: list[RunChange]) -> None:
        await self._database.before("commit")
        for change in changes:
            self._database.runs[change.after.id] = change.after
        await self._database.after("commit")

    return patch.object(MemoryRunStore, "commit", commit)


def publish_before_the_commit() -> AbstractContextManager[Any]:
    """The publications of a decision are sent before the decision is stored."""
    carry_out = ShardService._carry_out

    async def publish_and_carry_out(self: ShardService, batch: Any) -> None:
        await self._publish(batch.messages)
        batch.messages = []
        await carry_out(self, batch)

    return patch.object(ShardService, "_carry_out", publish_and_carry_out)


def write_the_log_after_the_state() -> AbstractContextManager[Any]:
    """The runs are stored first, then the entries of their logs."""
    carry_out = ShardService._carry_out

    async def carry_out_and_append(self: ShardService, batch: Any) -> None:
        log, batch.log = batch.log, []
        await carry_out(self, batch)
        await self._store.append_log(log)

    return patch.object(ShardService, "_carry_out", carry_out_and_append)


def forget_the_outbox_at_a_takeover() -> AbstractContextManager[Any]:
    """Messages that the last owner of a shard has stored, but not published, are lost."""
    load = Shard.load

    def load_without_outbox(self: Shard, runs: Any) -> None:
        load(self, [replace(run, outbox=()) for run in runs])

    return patch.object(Shard, "load", load_without_outbox)


def skip_the_look_back() -> AbstractContextManager[Any]:
    """A wait sees only events that arrive after it was registered."""

    async def nothing(self: Ingest, waits: Any) -> list[Any]:
        return []

    return patch.object(Ingest, "_look_back", nothing)


def store_repeated_events_again() -> AbstractContextManager[Any]:
    """An event that arrives twice is stored twice."""
    insert = MemoryEventStore.insert_events

    async def insert_all(self: MemoryEventStore, events: Any) -> set[str]:
        stored = self._database.events
        await insert(self, [_renamed(event) if event.id in stored else event for event in events])
        return set()

    def _renamed(event: Any) -> Any:
        return type(event)(**{**{name: getattr(event, name) for name in event.__slots__}, "id": f"{event.id}+"})

    return patch.object(MemoryEventStore, "insert_events", insert_all)


def look_at_an_event_only_once() -> AbstractContextManager[Any]:
    """An event that arrives again is ignored, even if its waits and triggers were not handled the first time."""
    store_events = Ingest._store_events

    async def store_new_ones(self: Ingest, events: Any) -> Any:
        parsed_events, new = await store_events(self, events)
        return [parsed_event for parsed_event in parsed_events if parsed_event.event.id in new], new

    return patch.object(Ingest, "_store_events", store_new_ones)


def ignore_whose_lease_a_report_is_about() -> AbstractContextManager[Any]:
    """A report is accepted for the task, even from an earlier invocation."""

    def holder(run: Any, lease: str) -> Any:
        return next((t for t in run.tasks if t.lease and run.task_run_id(t) == ids.task_run_of(lease)), None)

    return _patched_everywhere("holder", leases.holder, holder)


def lose_the_wake_up_at_the_checkpoint() -> AbstractContextManager[Any]:
    """A wait that has ended by the time of the eviction does not resume the task."""
    evict = transitions.evict

    def evict_without_resume(*args: Any, **options: Any) -> Any:
        with patch.object(durable_log, "can_resume", lambda task: False):
            return evict(*args, **options)

    return patch.object(transitions, "evict", evict_without_resume)


def let_a_repeated_claim_take_the_lease() -> AbstractContextManager[Any]:
    """A second claim of a ticket gets the lease that was granted to the first."""

    def grant_to_claimer(self: ShardTickets, claim: Any) -> None:
        held = self._state.held_tickets.task_run_of(claim.ticket)
        if held is not None:
            run, task = self._state.find(held)
            assert task.lease is not None
            taken = replace(task, lease=replace(task.lease, worker=claim.worker, inbox=claim.inbox))
            self._send_grant(run, taken)
        else:
            claimed(self, claim)

    claimed = ShardTickets.claimed
    return patch.object(ShardTickets, "claimed", grant_to_claimer)


def fire_timers_early() -> AbstractContextManager[Any]:
    """By half a second."""
    take_due = Horizon.take_due

    def take_too_much(self: Any, now: float, limit: int) -> list[Any]:
        return take_due(self, now + 0.5, limit)

    return patch.object(Horizon, "take_due", take_too_much)


def ask_again_under_the_same_id() -> AbstractContextManager[Any]:
    """Waits after a replay reuse the ids of the waits that were withdrawn before it."""
    wait_id = ids.wait_id

    def without_replays(task_run: str, wait_key: str, condition: str) -> str:
        return wait_id(task_run, ids.operation_id_of(wait_key), condition)

    return patch.object(ids, "wait_id", without_replays)


def keep_timers_in_memory_only() -> AbstractContextManager[Any]:
    """A timer is not stored before its message is acknowledged."""
    process = TimerService.process

    async def process_in_memory(self: TimerService, deliveries: Any) -> None:
        async def nothing(*args: Any) -> None: ...

        with patch.object(self._store, "change_timers", nothing):
            await process(self, deliveries)

    return patch.object(TimerService, "process", process_in_memory)


def claim_tickets_of_running_tasks() -> AbstractContextManager[Any]:
    """After a reconnect, tickets of tasks that still run are redelivered, and the worker claims new tasks with them."""
    delivered = Tickets.delivered

    def delivered_without_orphans(self: Tickets, kind: Any, delivery: Any) -> None:
        delivered(self, kind, delivery)
        while self._adopted[kind]:
            self._ask(self._adopted[kind].popleft())

    return patch.object(Tickets, "delivered", delivered_without_orphans)


def deliver_results_in_code_order() -> AbstractContextManager[Any]:
    """A replay delivers results in the order of the code, not in the order in which they arrived."""

    def first_asked(self: DurableInvocation) -> Any:
        waits = [(rank, w) for w in self._open if not w.done() and (rank := self.log.rank(w.operation_ids)) is not None]
        return max(waits, key=lambda pair: pair[0], default=None)

    return patch.object(DurableInvocation, "_first_deliverable", first_asked)


@contextmanager
def _patched_everywhere(name: str, original: Any, changed: Any) -> Iterator[None]:
    """Patch a function in every module that has imported it by name."""
    modules = [m for n, m in sys.modules.items() if n.startswith("sublet_") and getattr(m, name, None) is original]
    for module in modules:
        setattr(module, name, changed)
    try:
        yield
    finally:
        for module in modules:
            setattr(module, name, original)


@dataclass(frozen=True)
class Trial:
    """The mistake is noticed within the first ``seeds`` seeds. ``kinds``: only with faults of these kinds, because the
    mistake has an effect only after them."""

    seeds: int
    kinds: tuple[str, ...] = ()


MUTATIONS: dict[Mutation, Trial] = {
    acknowledge_before_the_confirm: Trial(5),
    acknowledge_before_handling: Trial(20, ("crash",)),
    drop_the_revision_check: Trial(50, ("freeze",)),
    publish_before_the_commit: Trial(5),
    write_the_log_after_the_state: Trial(5),
    forget_the_outbox_at_a_takeover: Trial(100, ("crash", "unconfirmed")),
    skip_the_look_back: Trial(50),
    store_repeated_events_again: Trial(20, ("doubled", "unconfirmed")),
    look_at_an_event_only_once: Trial(5, ("forgetting",)),
    ignore_whose_lease_a_report_is_about: Trial(100, ("cut", "freeze")),
    lose_the_wake_up_at_the_checkpoint: Trial(5),
    let_a_repeated_claim_take_the_lease: Trial(20, ("cut", "freeze")),
    fire_timers_early: Trial(20),
    ask_again_under_the_same_id: Trial(70, ("doubled", "delayed")),
    keep_timers_in_memory_only: Trial(20, ("crash",)),
    claim_tickets_of_running_tasks: Trial(100, ("cut",)),
    deliver_results_in_code_order: Trial(20),
}
