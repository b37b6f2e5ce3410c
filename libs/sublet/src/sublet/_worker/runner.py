"""The core of a worker: claims tickets, runs granted tasks, and reports their ends."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import Context as Variables
from contextvars import copy_context
from dataclasses import dataclass, field
from typing import Any

from sublet._amqp.publisher import BatchPublisher
from sublet._amqp.transport import PoolConsumer, TicketDelivery, Transport
from sublet._client.config import ClientConfig
from sublet._declare.task import Task
from sublet._durable import task_tree
from sublet._errors import TransportUnavailable
from sublet._worker.execution import Execution
from sublet._worker.tickets import CLAIM_REPEATED_S, HeldTicket, Tickets
from sublet_protocol import ids, limits
from sublet_protocol.messages import (
    Claim,
    Failed,
    Goodbye,
    Grant,
    GrantDeclined,
    Heartbeat,
    Hello,
    MalformedMessage,
    NoTask,
    OperationCompleted,
    Ping,
    Record,
    Revoked,
    TaskError,
    decode_for_worker,
    encode,
    encode_one,
)
from sublet_protocol.specs import SlotKind, WorkflowSpec
from sublet_protocol.topology import REQUESTS, WORKERS, pool_queue, run_key, worker_inbox

TIMEOUT_CHECK_INTERVAL_S = 0.1
"""Seconds between checks for tasks that exceeded their execution timeout and for claims without an answer."""

DRAIN_CHECK_INTERVAL_S = 0.1
"""Seconds between checks whether everything has ended, while the worker drains."""

HELLO_RETRY_PAUSE_S = 0.1
"""Seconds before a hello or goodbye is published again. The transport has waited for a connection before that."""

REPORT_RETRY_PAUSE_S = 1.0
"""Pause before reports are published again. The transport itself has waited for a connection before that."""

RECENT_LEASES = 10_000
"""Ended leases that are remembered, so that a grant that arrives twice is not run twice."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Registration:
    """What a worker is and can run. ``tasks`` are by (workflow, task); a kind without tasks has 0 slots."""

    worker_id: str
    name: str
    pool: str
    slots: int
    durable_slots: int
    tasks: Mapping[tuple[str, str], Task[Any, Any]]
    specs: tuple[WorkflowSpec, ...]
    labels: Mapping[str, str | int] = field(default_factory=dict)

    @property
    def inbox(self) -> str:
        return worker_inbox(self.worker_id)

    @property
    def capacity(self) -> dict[SlotKind, int]:
        """Slots by kind; kinds without slots are left out."""
        both: dict[SlotKind, int] = {"task": self.slots, "durable": self.durable_slots}
        return {kind: slots for kind, slots in both.items() if slots}


class Runner:
    """Call `start` once. `drain` shuts it down gracefully, `close` at once. See `Execution` for who owns which fact."""

    def __init__(
        self,
        registration: Registration,
        transport: Transport,
        config: ClientConfig,
        lifespan: Any,
        now: Callable[[], float],
    ) -> None:
        self._registration = registration
        self._transport = transport
        self._loop = asyncio.get_running_loop()
        self._thread = threading.get_ident()
        self._background: set[asyncio.Future[Any]] = set()
        self._executions: dict[str, Execution] = {}
        self._ended_leases: OrderedDict[str, None] = OrderedDict()
        self._reports = BatchPublisher(self._publish_until_confirmed, drop_cancelled=False)
        self._tickets = Tickets(transport, self._claim, self._report)
        self._busy = asyncio.Event()
        """Set while a task runs or a claim has no answer."""
        self._consumers: list[PoolConsumer] = []
        self._shards = ids.BUCKETS
        self.config = config
        self.lifespan = lifespan
        self.now = now
        self.variables = copy_context()
        self.draining = False
        self.releases = asyncio.Semaphore(limits.RELEASED_MAX_PER_WORKER)
        self.threads = ThreadPoolExecutor(
            max_workers=max(registration.slots, 1) + limits.RELEASED_MAX_PER_WORKER, thread_name_prefix="sublet-task"
        )

    # --- start and stop --------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Register with the schedulers, and begin to take work. The transport must be connected."""
        task_tree.install(self._loop)
        await self._transport.open_inbox(self._registration.inbox, self._on_message)
        await self._publish_to_schedulers(self._hello())
        self._transport.on_reconnect(self._on_reconnect)
        self.spawn(self._heartbeat_loop())
        self.spawn(self._check_timeouts_loop())
        for kind, slots in self._registration.capacity.items():
            self._consumers.append(await self._consume(kind, slots))

    async def drain(self) -> None:
        """Take no more work, evict waiting tasks, finish running ones, requeue the other tickets, and deregister."""
        for consumer in self._consumers:
            await consumer.cancel()
        self.draining = True
        self._tickets.drain()
        self._send_heartbeat()
        answers_until = self._loop.time() + CLAIM_REPEATED_S
        while (
            self._executions
            or not self._reports.idle
            or (self._tickets.unanswered and self._loop.time() < answers_until)
        ):
            for execution in list(self._executions.values()):
                if execution.durable_invocation is not None:
                    execution.durable_invocation.check()
            await asyncio.sleep(DRAIN_CHECK_INTERVAL_S)
        self._tickets.requeue_all()
        await self._publish_to_schedulers(Goodbye(self._registration.worker_id))

    def close(self) -> None:
        """Stop everything at once. Running tasks are recovered as after a crash."""
        for task in list(self._background):
            task.cancel()
        self._reports.close()
        self.threads.shutdown(wait=False, cancel_futures=True)

    def spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Run a coroutine of the SDK. In an empty context it does not count as a branch of a durable task."""
        task = self._loop.create_task(work, context=Variables())
        self._background.add(task)
        task.add_done_callback(self._background.discard, context=Variables())
        return task

    @property
    def held(self) -> Counter[str]:
        """Number of leases of this worker by `Execution.state`."""
        return Counter(execution.state for execution in self._executions.values())

    # --- for executions --------------------------------------------------------------------------------------------

    @property
    def worker_id(self) -> str:
        return self._registration.worker_id

    @property
    def labels(self) -> Mapping[str, str | int]:
        return self._registration.labels

    @property
    def in_loop_thread(self) -> bool:
        return threading.get_ident() == self._thread

    def report(self, lease: str, report: Record) -> asyncio.Future[None]:
        """Send a report to the scheduler of this lease. The future ends when RabbitMQ has confirmed it, and never
        fails."""
        return self._report(run_key(ids.run_of(lease), self._shards), report)

    def report_end(self, execution: Execution, build: Callable[[str | None, bool], Record]) -> asyncio.Future[None]:
        """Report the end of an execution, and ask for the next task if its ticket can be retained."""
        self._remember_ended(execution.lease)
        ticket = None if execution.released else execution.ticket
        more = ticket is not None and self._tickets.can_retain(ticket)
        if more and ticket is not None:
            self._tickets.wait_for_next(ticket)
        ticket_id = ticket.id if ticket is not None and not ticket.void else None
        confirmed = self.report(execution.lease, build(ticket_id, more))
        confirmed.add_done_callback(lambda _: self._confirmed(execution, more), context=Variables())
        return confirmed

    def revoked(self, execution: Execution) -> None:
        """Forget a revoked lease, whose code has stopped."""
        if self._executions.get(execution.lease) is execution:
            execution.forget()
            self._release(execution)

    def free_slot(self, execution: Execution) -> None:
        """Free the slot of a task that continues without it, or that has ended."""
        execution.holds_slot = False
        ticket, execution.ticket = execution.ticket, None
        if ticket is None or ticket.void:
            self._tickets.orphan_ended(execution.kind)
        else:
            self._tickets.acknowledge(ticket)

    def evict_for_capacity(self) -> None:
        """Evict one waiting task if every durable slot is held by a waiting task."""
        invocations = [
            e.durable_invocation
            for e in self._executions.values()
            if e.durable_invocation is not None and not e.released and not e.ended
        ]
        if len(invocations) < self._registration.durable_slots or any(
            invocation.waiting_since is None for invocation in invocations
        ):
            return
        candidates = [invocation for invocation in invocations if invocation.may_be_evicted_for_capacity]
        if candidates:
            min(candidates, key=lambda invocation: invocation.eviction_order).evict("capacity_pressure")

    def _confirmed(self, execution: Execution, more: bool) -> None:
        """RabbitMQ has confirmed the report of the end."""
        if not more:
            self._release(execution)
            return
        del self._executions[execution.lease]
        if execution.ticket is not None:
            self._tickets.expect(execution.ticket)

    def _release(self, execution: Execution) -> None:
        del self._executions[execution.lease]
        if execution.released:
            self.releases.release()
        else:
            self.free_slot(execution)

    # --- arriving messages -----------------------------------------------------------------------------------------

    def _on_message(self, body: bytes) -> None:
        try:
            records = decode_for_worker(body)
        except MalformedMessage as error:
            logger.error("cannot read a message in the inbox, ignoring it: %s", error)
            return
        for record in records:
            match record:
                case Grant():
                    self._granted(record)
                case NoTask():
                    self._tickets.no_task(record.ticket)
                case OperationCompleted():
                    execution = self._executions.get(record.lease)
                    if execution is not None and execution.durable_invocation is not None:
                        execution.durable_invocation.complete(record.operation_id, record.done)
                case Revoked():
                    self._revoke(record)
                case Ping():
                    self._answer_ping(record)
                case _:
                    logger.warning("unexpected %s in the inbox of a worker", type(record).__name__)

    def _granted(self, grant: Grant) -> None:
        self._shards = grant.shards
        if grant.lease in self._executions or grant.lease in self._ended_leases:
            return  # the answer to a repeated claim, or revoked before it arrived
        task = self._registration.tasks.get((grant.workflow, grant.task))
        ticket = self._tickets.serve(grant.ticket)
        kind: SlotKind = "durable" if task is not None and task.is_durable else "task"
        if self.draining or (ticket is None and not self._has_room(kind)):
            self._decline(grant, ticket)
        elif task is None:
            self._refuse(grant, ticket)
        else:
            if ticket is None:
                self._tickets.orphan_started(kind)
            execution = self._executions[grant.lease] = Execution(self, grant, task, ticket)
            self._busy.set()
            execution.start()

    def _has_room(self, kind: SlotKind) -> bool:
        """Whether a task without a ticket can run."""
        return self._taken(kind) + self._tickets.idle(kind) < self._registration.capacity.get(kind, 0)

    def _taken(self, kind: SlotKind) -> int:
        """Number of slots in which a task runs."""
        return sum(e.kind == kind and e.holds_slot and not e.ended for e in self._executions.values())

    def _decline(self, grant: Grant, ticket: HeldTicket | None) -> None:
        """Decline a grant, because the worker drains or has no free slot. The task is ready again."""
        self._remember_ended(grant.lease)
        confirmed = self.report(grant.lease, GrantDeclined(grant.lease, ticket.id if ticket is not None else None))
        if ticket is not None:
            confirmed.add_done_callback(lambda _: self._tickets.requeue(ticket), context=Variables())

    def _refuse(self, grant: Grant, ticket: HeldTicket | None) -> None:
        """Fail a task that this worker does not have: two different programs share a pool."""
        self._remember_ended(grant.lease)
        message = f"worker {self.worker_id} of pool {self._registration.pool} has no task {grant.workflow}:{grant.task}"
        logger.error("%s", message)
        error = TaskError("UnknownTask", message, task_run_id=ids.task_run_of(grant.lease))
        confirmed = self.report(grant.lease, Failed(grant.lease, grant.ticket, error, retryable=False))
        if ticket is not None:
            confirmed.add_done_callback(lambda _: self._tickets.acknowledge(ticket), context=Variables())

    def _revoke(self, message: Revoked) -> None:
        self._remember_ended(message.lease)
        execution = self._executions.get(message.lease)
        if execution is not None and not execution.ended and not execution.is_cancelled:
            logger.info("lease %s is revoked, cancelling its task: %s", message.lease, message.reason)
            execution.is_cancelled = True
            self.spawn(self._stop(execution))

    async def _stop(self, execution: Execution) -> None:
        """Give the code `limits.CANCEL_GRACE_S` to notice ``ctx.is_cancelled``; then cancel it."""
        await asyncio.sleep(limits.CANCEL_GRACE_S)
        if not execution.ended:
            execution.forget()
            await execution.stop_code()
            if execution.lease in self._executions:
                self._release(execution)

    def _remember_ended(self, lease: str) -> None:
        self._ended_leases[lease] = None
        if len(self._ended_leases) > RECENT_LEASES:
            self._ended_leases.popitem(last=False)

    # --- tickets ---------------------------------------------------------------------------------------------------

    async def _consume(self, kind: SlotKind, slots: int) -> PoolConsumer:
        def on_ticket(delivery: TicketDelivery) -> None:
            self._tickets.delivered(kind, delivery)

        return await self._transport.consume_pool(pool_queue(self._registration.pool, kind).name, slots, on_ticket)

    def _claim(self, ticket: HeldTicket) -> Claim:
        self._busy.set()
        return Claim(
            ticket=ticket.id,
            worker=self.worker_id,
            pool=self._registration.pool,
            kind=ticket.kind,
            inbox=self._registration.inbox,
            redelivered=ticket.delivery.redelivered,
        )

    # --- heartbeats ------------------------------------------------------------------------------------------------

    def _on_reconnect(self) -> None:
        self._tickets.reconnected()
        self._send_heartbeat()

    def _answer_ping(self, ping: Ping) -> None:
        if ping.hello:
            self._transport.publish_nowait(WORKERS, "", encode([self._hello()]))
        self._send_heartbeat()

    def _send_heartbeat(self) -> None:
        held = [e.held_lease for e in self._executions.values() if e.ended or not e.is_cancelled]
        heartbeat = Heartbeat(
            worker=self.worker_id,
            pool=self._registration.pool,
            inbox=self._registration.inbox,
            slots=self._registration.slots,
            durable_slots=self._registration.durable_slots,
            leases=tuple(held),
            draining=self.draining,
            taken=self._taken("task"),
            durable_taken=self._taken("durable"),
        )
        self._transport.publish_nowait(WORKERS, "", encode([heartbeat]))

    def _hello(self) -> Hello:
        return Hello(
            worker=self.worker_id,
            pool=self._registration.pool,
            name=self._registration.name,
            inbox=self._registration.inbox,
            slots=self._registration.slots,
            durable_slots=self._registration.durable_slots,
            workflows=self._registration.specs,
            at=self.now(),
            labels=dict(self._registration.labels),
        )

    async def _publish_to_schedulers(self, record: Record) -> None:
        while True:
            try:
                await self._transport.publish(WORKERS, "", encode([record]))
            except TransportUnavailable as error:
                logger.warning("%s is not confirmed, publishing it again: %s", type(record).__name__, error)
                await asyncio.sleep(HELLO_RETRY_PAUSE_S)
            else:
                return

    def _report(self, routing_key: str, report: Record) -> asyncio.Future[None]:
        return self._reports.add(routing_key, encode_one(report))

    async def _publish_until_confirmed(self, routing_key: str, body: bytes) -> None:
        """Reports must not be lost: a lease whose end is never reported would block its run until the worker dies."""
        while True:
            try:
                await self._transport.publish(REQUESTS, routing_key, body)
                return
            except TransportUnavailable as error:
                logger.warning("reports to %s are not confirmed, publishing them again: %s", routing_key, error)
            except Exception:
                logger.exception("reports to %s cannot be published, trying again", routing_key)
            await asyncio.sleep(REPORT_RETRY_PAUSE_S)

    async def _heartbeat_loop(self) -> None:
        while True:
            self._send_heartbeat()
            await asyncio.sleep(limits.HEARTBEAT_INTERVAL_S)

    async def _check_timeouts_loop(self) -> None:
        """Check timeouts and unanswered claims. An idle worker does not wake up."""
        while True:
            await self._busy.wait()
            await asyncio.sleep(TIMEOUT_CHECK_INTERVAL_S)
            self._tickets.ask_again()
            for execution in [e for e in self._executions.values() if e.clock.is_exceeded and not e.ended]:
                execution.time_out()
            if not self._executions and not self._tickets.unanswered:
                self._busy.clear()


def actions_of(tasks: Sequence[Task[Any, Any]]) -> list[str]:
    """``<workflow>:<task>:<kind>`` of each task, sorted. A pool is named by a digest of these."""
    return sorted(f"{task.workflow_name}:{task.name}:{'durable' if task.is_durable else 'task'}" for task in tasks)
