"""A worker on a bench: an in-memory transport, and a scheduler that says what the test lets it say."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from sublet._amqp.transport import TicketDelivery
from sublet._client.client import Sublet
from sublet._client.config import ClientConfig
from sublet._declare.standalone import Standalone
from sublet._errors import TransportUnavailable
from sublet._worker.worker import Worker
from sublet_protocol import ids
from sublet_protocol.messages import (
    Claim,
    Completion,
    Evicted,
    Failed,
    Finished,
    Goodbye,
    Grant,
    Heartbeat,
    Hello,
    LogEntry,
    NoTask,
    Operation,
    OperationCompleted,
    Record,
    Recorded,
    ShardMessage,
    TaskError,
    Ticket,
    decode_for_shard,
    encode,
    encode_one,
)
from support.polling import until

client = Sublet(ClientConfig(amqp_url="amqp://nowhere/"), background=False)
"""Declares the tasks of the tests."""

Runnable = Standalone[Any, Any]


class BenchTransport:
    """One connection. ``confirming`` off: publishes are sent, but their confirms are held back."""

    def __init__(self) -> None:
        self.sent: list[tuple[str, str, list[ShardMessage]]] = []
        self.on_sent: Callable[[ShardMessage, str], None] = lambda record, key: None
        self.confirming = asyncio.Event()
        self.confirming.set()
        self.failures = 0
        self.unacked: dict[int, tuple[str, TicketDelivery]] = {}
        self.requeued: list[Ticket] = []
        self.acked: list[Ticket] = []
        self.closed = False
        self._on_message: Callable[[bytes], None] = lambda body: None
        self._pools: dict[str, Callable[[TicketDelivery], None]] = {}
        self._prefetch: dict[str, int] = {}
        self._queued: dict[str, deque[tuple[bytes, bool]]] = {"task": deque(), "durable": deque()}
        self._reconnect: list[Callable[[], None]] = []
        self._channel = 1
        self._tag = 0

    connected = True

    async def connect(self) -> None: ...

    async def close(self) -> None:
        self.closed = True

    async def publish(
        self,
        exchange: str,
        routing_key: str,
        body: bytes,
        *,
        persistent: bool = True,
        message_id: str | None = None,
        headers: Mapping[str, object] | None = None,
    ) -> None:
        await asyncio.sleep(0)
        if self.failures:
            self.failures -= 1
            raise TransportUnavailable("not confirmed")
        self._send(exchange, routing_key, body)
        await self.confirming.wait()

    def publish_nowait(self, exchange: str, routing_key: str, body: bytes) -> None:
        self._send(exchange, routing_key, body)

    def _send(self, exchange: str, routing_key: str, body: bytes) -> None:
        records = decode_for_shard(body)
        self.sent.append((exchange, routing_key, records))
        for record in records:
            self.on_sent(record, exchange)

    async def open_inbox(self, name: str, on_message: Callable[[bytes], None]) -> None:
        self._on_message = on_message

    async def consume_pool(
        self, queue: str, prefetch: int, on_ticket: Callable[[TicketDelivery], None]
    ) -> BenchConsumer:
        kind = queue.rpartition(".")[2]
        self._pools[kind] = on_ticket
        self._prefetch[kind] = prefetch
        self._push(kind)
        return BenchConsumer(self, kind)

    def ack(self, ticket: TicketDelivery) -> None:
        if self.unacked.pop(ticket.tag, None) is not None:
            self.acked.append(msgspec.json.decode(ticket.body, type=Ticket))
            self._push_all()

    def requeue(self, ticket: TicketDelivery) -> None:
        if self.unacked.pop(ticket.tag, None) is not None:
            self.requeued.append(msgspec.json.decode(ticket.body, type=Ticket))
            self._push_all()

    def on_reconnect(self, callback: Callable[[], None]) -> None:
        self._reconnect.append(callback)

    # --- for tests ------------------------------------------------------------------------------------------------

    def say(self, *records: Record) -> None:
        """Deliver to the worker's inbox."""
        asyncio.get_running_loop().call_soon(self._on_message, encode(list(records)))

    def offer(self, kind: str, ticket: Ticket, redelivered: bool = False) -> None:
        self._queued[kind].append((encode_one(ticket), redelivered))
        self._push(kind)

    def taken(self, kind: str) -> int:
        """What RabbitMQ counts as unacknowledged."""
        return sum(k == kind for k, _ in self.unacked.values())

    def lose_connection(self, *, callback_first: bool = True) -> None:
        """The connection breaks and is back at once; what was unacknowledged is delivered again."""
        lost = list(self.unacked.values())
        self.unacked.clear()
        self._channel += 1
        for kind, delivery in reversed(lost):
            self._queued[kind].appendleft((delivery.body, True))
        steps = [self._push_all, *self._reconnect]
        for step in reversed(steps) if callback_first else steps:
            step()

    def _push_all(self) -> None:
        for kind in self._pools:
            self._push(kind)

    def _push(self, kind: str) -> None:
        while kind in self._pools and self._queued[kind] and self.taken(kind) < self._prefetch[kind]:
            body, redelivered = self._queued[kind].popleft()
            self._tag += 1
            delivery = TicketDelivery(body, redelivered, (self._channel, kind), self._tag)
            self.unacked[self._tag] = (kind, delivery)
            asyncio.get_running_loop().call_soon(self._pools[kind], delivery)


class BenchConsumer:
    def __init__(self, transport: BenchTransport, kind: str) -> None:
        self._transport = transport
        self._kind = kind

    async def cancel(self) -> None:
        self._transport._pools.pop(self._kind, None)


class WorkerHarness:
    """Answers claims with what `run` put up, in order, and keeps durable logs as a scheduler would."""

    def __init__(self, *workflows: Runnable, **options: Any) -> None:
        self.transport = BenchTransport()
        self.transport.on_sent = self._on_sent
        self.reports: list[ShardMessage] = []
        self.claims: list[Claim] = []
        self.heartbeats: list[Heartbeat] = []
        self.answering = True
        self._ready: deque[Grant] = deque()
        self._logs: dict[str, dict[str, LogEntry]] = {}
        self._invocations: dict[str, int] = {}
        self._grants: dict[str, Grant] = {}
        self._order: dict[str, int] = {}
        self._tickets = 0
        self.worker = Worker(
            "bench",
            client.config,
            workflows=workflows,
            transport=self.transport,
            **options,
        )

    async def __aenter__(self) -> WorkerHarness:
        await self.worker.aio_start()
        return self

    async def __aexit__(self, *_: object) -> None:
        self.transport.confirming.set()
        self.answering = True
        runner = self.worker._runner
        assert runner is not None
        runner.close()

    # --- what a test does -----------------------------------------------------------------------------------------

    def put_up(self, workflow: Runnable, run: str = "run", **grant: Any) -> str:
        """Make a task ready; returns its task run id. It is granted to the next claim."""
        task = workflow.task
        task_run = ids.task_run_id(run, task.name)
        invocation = self._invocations[task_run] = self._invocations.get(task_run, 0) + 1
        made = {
            "workflow": task.workflow_name,
            "version": "v",
            "task": task.name,
            "input": msgspec.Raw(b"{}"),
            "retry_count": 0,
            "timeout_s": 60.0,
            **grant,
        }
        log = tuple(self._logs.get(task_run, {}).values())
        self._ready.append(
            Grant(ticket="", lease=ids.lease_id(task_run, invocation), invocation=invocation, log=log, **made)
        )
        self._grants[task_run] = self._ready[-1]
        return task_run

    def offer(self, kind: str = "task", ticket: str | None = None) -> str:
        self._tickets += 1
        ticket = ticket or f"ticket-{self._tickets}"
        self.transport.offer(kind, Ticket(ticket, "scheduler", "bucket.00"))
        return ticket

    def run(self, workflow: Runnable, run: str = "run", **grant: Any) -> str:
        """Make it ready, with a ticket of its own. Again for the same run: the next invocation, with its log."""
        task_run = self.put_up(workflow, run, **grant)
        self.offer("durable" if workflow.task.is_durable else "task")
        return task_run

    def lease(self, task_run: str) -> str:
        return self._grants[task_run].lease

    def end(
        self, task_run: str, operation_id: str, result: object = None, error: TaskError | None = None, position: int = 0
    ) -> Completion:
        """Complete an operation: record it, and send it to the holder of the lease."""
        order = self._order[task_run] = self._order.get(task_run, 0) + 1
        done = Completion(order, msgspec.Raw(msgspec.json.encode(result)), error, position)
        entry = self._logs[task_run][operation_id]
        self._logs[task_run][operation_id] = msgspec.structs.replace(entry, done=done)
        self.transport.say(OperationCompleted(self.lease(task_run), operation_id, done))
        return done

    def sleep_over(self, task_run: str, operation_id: str, position: int = 0) -> Completion:
        return self.end(task_run, operation_id, {"CREATE": {"sleep": [{"duration_s": 1.0}]}}, position=position)

    def log(self, task_run: str) -> dict[str, LogEntry]:
        return self._logs.get(task_run, {})

    def of(self, kind: type[Any]) -> list[Any]:
        return [report for report in self.reports if isinstance(report, kind)]

    async def until(self, condition: Callable[[], object]) -> None:
        """Wait for what must happen, however long the machine takes."""
        await until(condition)

    async def settled(self, rounds: int = 50) -> None:
        """Let everything happen that needs no time."""
        for _ in range(rounds):
            await asyncio.sleep(0)

    async def evicted(self, number: int = 1) -> Evicted:
        await self.until(lambda: len(self.of(Evicted)) >= number)
        last: Evicted = self.of(Evicted)[number - 1]
        return last

    async def finished(self, number: int = 1) -> Any:
        """The output of the number-th task that finished, decoded."""
        await self.until(lambda: len(self.of(Finished)) + len(self.of(Failed)) >= number)
        assert not self.of(Failed), self.of(Failed)
        return msgspec.json.decode(self.of(Finished)[number - 1].output)

    async def failed(self) -> Failed:
        await self.until(lambda: self.of(Failed))
        failed: Failed = self.of(Failed)[0]
        return failed

    # --- the scheduler --------------------------------------------------------------------------------------------

    def _on_sent(self, record: ShardMessage, exchange: str) -> None:
        match record:
            case Claim():
                self.claims.append(record)
                if self.answering:
                    self.answer(record.ticket)
                return
            case Heartbeat():
                self.heartbeats.append(record)
                return
            case Hello() | Goodbye():
                return
            case Evicted() | Recorded():
                self._record(record.lease, record.operations)
        self.reports.append(record)
        if isinstance(record, Finished | Failed | Evicted) and record.next and self.answering:
            assert record.ticket is not None
            self.answer(record.ticket)

    def answer(self, ticket: str) -> None:
        if self._ready:
            self.transport.say(msgspec.structs.replace(self._ready.popleft(), ticket=ticket))
        else:
            self.transport.say(NoTask(ticket))

    def _record(self, lease: str, operations: tuple[Operation, ...]) -> None:
        entries = self._logs.setdefault(ids.task_run_of(lease), {})
        for operation in operations:
            entries[operation.operation_id] = LogEntry(
                operation_id=operation.operation_id,
                kind=operation.kind,
                fingerprint=operation.fingerprint,
                asked=operation.asked,
                result=operation.result,
                version="v",
            )
