"""A fake broker that records the messages of a client and answers as the test defines. For tests of the SDK alone."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec

from sublet import ClientConfig, Sublet
from sublet._amqp.transport import TicketDelivery
from sublet_protocol.messages import Query, Record, Reply, RunRequest, RunResult, ShardMessage, WatchRun, encode

_decode = msgspec.json.Decoder(list[ShardMessage | Query]).decode

Answer = Callable[[Record], list[Record]]


@dataclass(frozen=True)
class Published:
    exchange: str
    routing_key: str
    body: bytes
    persistent: bool
    message_id: str | None
    headers: Mapping[str, object]


@dataclass
class FakeBroker:
    """``answer`` receives every record for a shard, and returns the records for the inbox of the client."""

    answer: Answer
    published: list[Published] = field(default_factory=list)
    transports: list[FakeTransport] = field(default_factory=list)

    def __call__(self, config: ClientConfig) -> FakeTransport:
        self.transports.append(FakeTransport(self))
        return self.transports[-1]

    @property
    def records(self) -> list[Record]:
        return [r for p in self.published if p.exchange == "sublet.requests" for r in _decode(p.body)]

    @property
    def requests(self) -> list[RunRequest]:
        return [record for record in self.records if isinstance(record, RunRequest)]

    @property
    def watches(self) -> list[WatchRun]:
        return [record for record in self.records if isinstance(record, WatchRun)]


class FakeTransport:
    """A transport that is always connected. It has only the methods that a client needs."""

    connected = True

    def __init__(self, broker: FakeBroker) -> None:
        self._broker = broker
        self._inboxes: dict[str, Callable[[bytes], None]] = {}
        self._on_reconnect: list[Callable[[], None]] = []
        self.closed = False

    @property
    def inboxes(self) -> list[str]:
        return list(self._inboxes)

    async def connect(self) -> None:
        await asyncio.sleep(0)

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
        published = Published(exchange, routing_key, body, persistent, message_id, headers or {})
        self._broker.published.append(published)
        if exchange == "sublet.requests":
            for record in _decode(body):
                answers = self._broker.answer(record)
                if answers:
                    asyncio.get_running_loop().call_soon(self.deliver, answers)

    def publish_nowait(self, exchange: str, routing_key: str, body: bytes) -> None:
        raise NotImplementedError

    async def open_inbox(self, name: str, on_message: Callable[[bytes], None]) -> None:
        self._inboxes[name] = on_message

    async def consume_pool(self, queue: str, prefetch: int, on_ticket: Callable[[TicketDelivery], None]) -> Any:
        raise NotImplementedError

    def ack(self, ticket: TicketDelivery) -> None:
        raise NotImplementedError

    def requeue(self, ticket: TicketDelivery) -> None:
        raise NotImplementedError

    def on_reconnect(self, callback: Callable[[], None]) -> None:
        self._on_reconnect.append(callback)

    def deliver(self, records: list[Record]) -> None:
        for on_message in self._inboxes.values():
            on_message(encode(records))

    def reconnect(self) -> None:
        for callback in self._on_reconnect:
            callback()


def client(answer: Answer, **options: Any) -> tuple[Sublet, FakeBroker]:
    """A client in front of a fake broker."""
    broker = FakeBroker(answer)
    config = options.pop("config", None) or ClientConfig()
    return Sublet(config, transport_factory=broker, **options), broker


def silent(record: Record) -> list[Record]:
    """Give no answer."""
    return []


def echo(record: Record) -> list[Record]:
    """Every workflow completes at once: its only task, of the same name in lower case, returns the input."""
    if isinstance(record, RunRequest) and record.reply_to:
        return [completed(record.run_id, {record.workflow.lower(): bytes(record.input)})]
    return []


def completed(run_id: str, outputs: Mapping[str, bytes]) -> RunResult:
    return RunResult(
        run_id=run_id, status="COMPLETED", outputs={task: msgspec.Raw(raw) for task, raw in outputs.items()}
    )


def reply(correlation_id: str | None, value: Any = None, error: str | None = None) -> Reply:
    assert correlation_id is not None
    return Reply(correlation_id=correlation_id, value=msgspec.Raw(msgspec.json.encode(value)), error=error)
