"""A shard among models of all that it talks to: workers, broker, timer, event-ingest, clients. Every
step is a choice of the test, so that a test can choose the worst order.

Messages from one source arrive in order, those of different sources in any order. Messages that were handled but not
committed are redelivered after a crash. Unconfirmed messages to inboxes may be lost, those of an outbox may not.
"""

from __future__ import annotations

import contextlib
import itertools
from collections import defaultdict, deque
from typing import assert_never

from sublet_engine.run import leases
from sublet_engine.run.effects import position_at
from sublet_engine.run.state import TaskRun
from sublet_engine.shard.shard import Shard
from sublet_protocol import ids, limits
from sublet_protocol.destinations import Bucket, Inbox, Ingest, Notice, Pool, Timer
from sublet_protocol.messages import (
    CancelRun,
    CancelTimer,
    EventMatched,
    Evicted,
    Failed,
    Finished,
    Goodbye,
    Grant,
    OperationCompleted,
    ReplayRun,
    RunRequest,
    RunResult,
    SetTimer,
    ShardMessage,
    Subscribe,
    Tick,
    TimerFired,
    Unsubscribe,
)
from sublet_protocol.specs import EventCondition, SlotKind
from support.engine_builders import raw
from support.shard_harness import Conflict, Sent, ShardHarness, inbox_of
from support.worker_model import EVENTS, FLOWS, SLOTS, WorkerModel

CLIENT = "client"
CLAIMS = "claims"
"""The source whose messages do not come again after a crash."""

SETTLING_ROUNDS = 600
"""Enough for every timeout, backoff and loss that a test can have caused; in each a second passes."""


class Cluster:
    def __init__(self) -> None:
        self.world = ShardHarness(*FLOWS)
        self.lanes: dict[str, deque[ShardMessage]] = defaultdict(deque)
        """To the shard, by source."""
        self.history: list[ShardMessage] = []
        """What was handled at some time."""
        self.tickets: dict[SlotKind, deque[tuple[str, bool]]] = {"task": deque(), "durable": deque()}
        """In the pool's queues, with whether they were delivered before."""
        self.workers: dict[str, WorkerModel] = {}
        self.timers: dict[str, SetTimer] = {}
        self.waits: dict[str, Subscribe] = {}
        self.results: dict[str, set[str | None]] = defaultdict(set)
        """The ends that the client was told of, by run; a late one may be of an earlier life of the run."""
        self.requested: list[str] = []
        self._events: list[tuple[int, str]] = []
        self._handled: list[tuple[str, ShardMessage]] = []
        self.superseded: Shard | None = None
        """As the process that owned the shard before sees it; it has not noticed."""
        self._numbers = itertools.count()
        self._ends: dict[tuple[str, str], tuple[int, bytes]] = {}

    # --- the shard ----------------------------------------------------------------------------------------------

    def deliver(self, lane: str) -> None:
        """The next message of a source is handled. A report counts if its lease is current, and else not at all."""
        message = self.lanes[lane].popleft()
        self._handled.append((lane, message))
        self.history.append(message)
        if not isinstance(message, Finished | Failed | Evicted):
            self.world.decide(message)
            return
        before = self._task(message.lease)
        current = self._is_current(message.lease)
        self.world.decide(message)
        after = self._task(message.lease)
        if not current:
            assert after is before, f"{message.lease} is not current, but a report under it changed its task to {after}"
            return
        assert not self._is_current(message.lease), f"{message.lease} goes on after {type(message).__name__}"
        if isinstance(message, Finished):
            assert after is not None
            assert after.output == str(message.output, "utf-8"), f"{message.lease} gave {message.output!r}: {after}"

    def commit(self) -> None:
        """Commit, publish, acknowledge. If another owner was faster with something, all begins anew."""
        try:
            batch = self.world.commit()
        except Conflict:
            self._begin_anew()
            return
        self._handled.clear()
        self._route(self.world.publish(batch))

    def crash(self, *, committed: bool) -> None:
        """Everything in memory is gone. ``committed``: the batch was written, but not published."""
        if committed:
            with contextlib.suppress(Conflict):
                self.world.commit()
        self._begin_anew()

    def supersede(self) -> None:
        """The shard goes to another process while this one is in the middle of a batch, and does not know it."""
        self.superseded = self.world.shard
        self._begin_anew()

    def commit_superseded(self) -> None:
        """The process that has lost the shard goes on with its batch, until it meets a conflict."""
        if self.superseded is None:
            return
        try:
            batch = self.world.commit(self.superseded)
        except Conflict:
            self.superseded = None
        else:
            self._route(self.world.publish(batch))

    def claim_from_superseded(self) -> None:
        """It also gets the claims for the tickets that it has issued."""
        if self.superseded is not None and self.lanes[CLAIMS]:
            self.superseded.handle(self.lanes[CLAIMS].popleft(), self.world.now)

    def _begin_anew(self) -> None:
        for lane, message in reversed(self._handled):
            if lane != CLAIMS:
                self.lanes[lane].appendleft(message)
        self._handled.clear()
        self.world.take_over()

    def _task(self, lease: str) -> TaskRun | None:
        self.world.load(ids.run_of(lease))
        run = self.world.shard.state.runs.get(ids.run_of(lease))
        return run.task(ids.task_of(ids.task_run_of(lease))) if run is not None else None

    def _is_current(self, lease: str) -> bool:
        run = self.world.shard.state.runs.get(ids.run_of(lease))
        return run is not None and leases.holder(run, lease) is not None

    # --- what it publishes --------------------------------------------------------------------------------------

    def _route(self, sent: Sent) -> None:
        for to, message in sent:
            match to:
                case Bucket():
                    self.lanes["shards"].append(message)
                case Timer():
                    self._to_timer(message)
                case Ingest():
                    self._to_ingest(message)
                case Inbox():
                    self._to_inbox(to.name, message)
                case Pool():
                    self.tickets[to.kind].append((message.id, False))
                case Notice():
                    pass
                case _:
                    assert_never(to)

    def _to_timer(self, message: SetTimer | CancelTimer) -> None:
        if isinstance(message, CancelTimer):
            self.timers.pop(message.id, None)
        else:
            self.timers.setdefault(message.id, message)

    def _to_ingest(self, message: object) -> None:
        if isinstance(message, Unsubscribe):
            self.waits.pop(message.id, None)
        elif isinstance(message, Subscribe):
            self.waits[message.id] = message
            for seq, key in self._events:
                self._match(seq, key)

    def _to_inbox(self, inbox: str, message: object) -> None:
        if isinstance(message, RunResult):
            assert inbox == CLIENT
            self.results[message.run_id].add(message.status)
            return
        if isinstance(message, Grant):
            self._check_log(message)
        if isinstance(message, OperationCompleted):
            done = message.done
            self._check_end(ids.task_run_of(message.lease), message.operation_id, done.order, bytes(done.result))
        for worker in self.workers.values():
            if inbox_of(worker.name) == inbox:
                worker.inbox.append(message)  # type: ignore[arg-type]

    def _check_log(self, grant: Grant) -> None:
        """Results never change, and have the numbers 1, 2, 3 …"""
        done = [entry.done for entry in grant.log if entry.done is not None]
        assert sorted(end.order for end in done) == list(range(1, len(done) + 1)), f"{grant.lease} has a gap: {done}"
        for entry in grant.log:
            if entry.done is not None:
                self._check_end(
                    ids.task_run_of(grant.lease), entry.operation_id, entry.done.order, bytes(entry.done.result)
                )

    def _check_end(self, task_run: str, operation_id: str, order: int, result: bytes) -> None:
        first = self._ends.setdefault((task_run, operation_id), (order, result))
        assert first == (order, result), f"{operation_id} of {task_run} ended as {first}, and now as {(order, result)}"

    # --- the others ---------------------------------------------------------------------------------------------

    def request(self, flow: str) -> None:
        run_id = f"run-{next(self._numbers)}"
        self.requested.append(run_id)
        self.lanes[CLIENT].append(RunRequest(run_id, flow, reply_to=CLIENT))

    def cancel(self, run_id: str) -> None:
        self.lanes[CLIENT].append(CancelRun(run_id))

    def replay(self, run_id: str) -> None:
        self.lanes[CLIENT].append(ReplayRun(run_id, correlation_id=f"replay-{next(self._numbers)}"))

    def tick(self, by_s: float) -> None:
        """Time passes, and what is due fires."""
        self.world.now += by_s
        self.lanes["ticks"].append(Tick(self.world.now))
        for timer in [timer for timer in self.timers.values() if timer.due <= self.world.now]:
            del self.timers[timer.id]
            self.lanes["timer"].append(TimerFired(timer.task_run_id, timer.operation_id, timer.key))

    def publish_event(self, key: str) -> None:
        last = self._events[-1][0] if self._events else 0
        seq = max(last + 1, position_at(self.world.now))
        self._events.append((seq, key))
        self._match(seq, key)

    def _match(self, seq: int, key: str) -> None:
        for wait in list(self.waits.values()):
            assert isinstance(wait.condition, EventCondition)
            if wait.condition.event_key == key and wait.since < seq:
                del self.waits[wait.id]
                event_id, payload = f"event-{seq}", raw({"seq": seq})
                matched = EventMatched(wait.task_run_id, wait.operation_id, wait.condition.key, event_id, seq, payload)
                self.lanes["ingest"].append(matched)

    # --- workers ------------------------------------------------------------------------------------------------

    def start_worker(self) -> None:
        worker = WorkerModel(f"worker-{next(self._numbers)}")
        self.workers[worker.name] = worker
        self.lanes[worker.name].append(worker.hello())

    def heartbeat(self, worker: WorkerModel) -> None:
        self.lanes[worker.name].append(worker.heartbeat())

    def give_ticket(self, worker: WorkerModel, kind: SlotKind) -> None:
        """RabbitMQ delivers a ticket, if the worker has room and there is one."""
        if worker.room(kind) > 0 and self.tickets[kind]:
            ticket, redelivered = self.tickets[kind].popleft()
            self._claim(worker, worker.take(ticket, kind, redelivered=redelivered))

    def ask_again(self, worker: WorkerModel) -> None:
        """Claims that were not answered are repeated, to the shard's own queue."""
        self.lanes[worker.name].extend(worker.claim(ticket) for ticket in worker.idle_tickets())

    def receive(self, worker: WorkerModel) -> None:
        """The next message of its inbox."""
        if worker.inbox:
            reports, ticket = worker.receive(worker.inbox.popleft())
            self.lanes[worker.name].extend(reports)
            self._claim(worker, ticket)

    def act(self, worker: WorkerModel, pick: int, choice: str, *, more: bool) -> None:
        """One of its tasks comes to its end, a wait, or something in between."""
        if worker.executions:
            lease = list(worker.executions)[pick % len(worker.executions)]
            reports, ticket = worker.act(lease, choice, more=more, number=next(self._numbers))
            self.lanes[worker.name].extend(reports)
            self._claim(worker, ticket)

    def break_connection(self, worker: WorkerModel) -> None:
        """Its tickets go to somebody again, its inbox is lost, its tasks go on; it reports at once."""
        self._requeue(worker)
        worker.lose_connection()
        self.heartbeat(worker)

    def kill(self, worker: WorkerModel) -> None:
        """What it has published is published."""
        self._requeue(worker)
        del self.workers[worker.name]

    def drain(self, worker: WorkerModel) -> None:
        """It takes no more work, and leaves when it has none."""
        worker.leaving = True
        self.heartbeat(worker)
        if not worker.executions:
            self.kill(worker)
            self.lanes[worker.name].append(Goodbye(worker.name))

    def _claim(self, worker: WorkerModel, ticket: str | None) -> None:
        if ticket is not None:
            self.lanes[CLAIMS].append(worker.claim(ticket))

    def _requeue(self, worker: WorkerModel) -> None:
        for ticket, kind in (*worker.held.items(), *worker.adopted.items()):
            self.tickets[kind].appendleft((ticket, True))

    # --- the end ------------------------------------------------------------------------------------------------

    def settle(self) -> None:
        """Let everybody do the right thing, until every run has ended."""
        if not self.workers:
            self.start_worker()
        for round_number in range(SETTLING_ROUNDS):
            self.tick(limits.TICK_INTERVAL_S)
            for key in EVENTS:
                self.publish_event(key)
            for worker in list(self.workers.values()):
                self._do_well(worker, round_number)
            self._deliver_all()
            if not any(self.lanes.values()) and all(self.is_over(run_id) for run_id in self.world.runs):
                return
        stuck = [run for run_id in self.world.runs if (run := self.world.run(run_id)) and not run.terminal]
        raise AssertionError(f"these runs never end: {stuck}")

    def is_over(self, run_id: str) -> bool:
        run = self.world.run(run_id)
        return run is not None and run.terminal

    def _do_well(self, worker: WorkerModel, round_number: int) -> None:
        while worker.inbox:
            self.receive(worker)
        for kind in SLOTS:
            self.give_ticket(worker, kind)
        for pick in range(len(worker.executions)):
            self.act(worker, pick, "go on", more=round_number % 2 == 0)
        if round_number % 4 == 0:
            self.heartbeat(worker)
            self.ask_again(worker)
        if worker.leaving and not worker.executions:
            self.drain(worker)
            self.start_worker()

    def _deliver_all(self) -> None:
        for lane in list(self.lanes):
            while self.lanes[lane]:
                self.deliver(lane)
        self.commit()
