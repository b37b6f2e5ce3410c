"""From deliveries to batches: what has arrived is handled together, and acknowledged when that has succeeded.

Batches form by themselves: one is begun as soon as the loop is idle, the next gathers while it is under way.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Mapping

from sublet_platform.metrics import ServiceMetrics
from sublet_platform.ports import (
    Broker,
    BrokerUnavailable,
    Delivery,
    Outgoing,
    Process,
    RevisionConflict,
    StoreUnavailable,
)
from sublet_protocol import limits
from sublet_protocol.backoff import Backoff
from sublet_protocol.topology import DEAD

log = logging.getLogger(__name__)

LETTER_HEADERS_MAX_BYTES = 65_536
"""Headers that a dead letter keeps of what it was: half of an AMQP frame, which has to hold all the headers of a
message. A frame that is larger costs the connection."""
_SHORT_TEXT_MAX_BYTES = 255

Reject = Callable[[Delivery, str], Awaitable[None]]
"""Puts a message that nobody can use among the dead letters, with the reason; see `dead_letter`."""

REASON_MAX_CHARS = 500
CONFLICT_PAUSE_S = 0.05
"""After a conflict the messages come back at once, maybe to us: no hot loop while two owners sort things out."""


def _nothing() -> None:
    """The owner keeps nothing that it would have to drop."""


class BatchLoop:
    """Hands batches of deliveries to ``process`` and settles them.

    * success: acknowledged.
    * StoreUnavailable, BrokerUnavailable: ``on_failure()`` (drop caches: nobody knows what was written), a growing
      delay, and the same deliveries again, less those whose channel has gone.
    * RevisionConflict: ``on_conflict()``, and the deliveries go back to the queue.
    * any other exception: ``on_failure()``, then one by one; the message that fails alone goes to ``sublet.dead``.
    """

    def __init__(
        self,
        process: Process,
        broker: Broker,
        metrics: ServiceMetrics,
        *,
        name: str,
        max_items: int = limits.BATCH_MAX_ITEMS,
        max_bytes: int = limits.COMMIT_MAX_BYTES,
        on_failure: Callable[[], None] = _nothing,
        on_conflict: Callable[[], None] = _nothing,
    ) -> None:
        self._process = process
        self._broker = broker
        self._metrics = metrics
        self._name = name
        self._max_items = max_items
        self._max_bytes = max_bytes
        self._on_failure = on_failure
        self._on_conflict = on_conflict
        self._waiting: deque[Delivery] = deque()
        self._wake_up = asyncio.Event()
        self._stopping = False
        self._resting = False
        self._at_rest = asyncio.Event()
        """No batch is under way."""
        self._at_rest.set()
        self._task: asyncio.Task[None] | None = None

    def handle(self, delivery: Delivery) -> None:
        """The handler to consume with."""
        self._waiting.append(delivery)
        self._wake_up.set()

    def start(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._run(), name=f"batches of {self._name}")

    async def stop(self) -> None:
        """Returns when what has arrived is handled; while a server is away, what is in hand is given back instead."""
        self._stopping = True
        self._wake_up.set()
        if self._task is not None:
            await self._task

    async def rest(self) -> None:
        """Returns when the batch that is under way is settled; no other is begun before `resume`.

        Whoever gives up a place as the single active consumer rests and then closes its channel, so that the next one
        is served what was not handled here, and nothing before all else is done.
        """
        self._resting = True
        await self._at_rest.wait()

    def resume(self) -> None:
        self._resting = False
        self._wake_up.set()

    @property
    def alive(self) -> bool:
        return self._task is not None and not self._task.done()

    async def _run(self) -> None:
        while True:
            await self._wake_up.wait()
            while self._waiting and not self._resting:
                self._at_rest.clear()
                await self._settle(self._take())
            self._at_rest.set()
            if self._stopping:
                return
            self._wake_up.clear()

    def _take(self) -> list[Delivery]:
        """As much as one batch may hold, at least one."""
        taken = [self._waiting.popleft()]
        size = len(taken[0].body)
        while self._waiting and len(taken) < self._max_items:
            size += len(self._waiting[0].body)
            if size > self._max_bytes:
                break
            taken.append(self._waiting.popleft())
        return self._valid(taken)

    def _valid(self, deliveries: list[Delivery]) -> list[Delivery]:
        return [delivery for delivery in deliveries if not self._broker.is_void(delivery)]

    async def _settle(self, batch: list[Delivery]) -> None:
        """Try until the batch is acknowledged, given back, void or dead-lettered."""
        backoff = Backoff()
        while batch:
            try:
                await self._attempt(batch)
            except (StoreUnavailable, BrokerUnavailable) as error:
                self._on_failure()
                if self._stopping or self._resting:
                    return self._broker.requeue(batch)
                delay_s = backoff.next_s()
                log.warning("%s: %s; again in %.1f s", self._name, error, delay_s, extra={"batch": len(batch)})
                await asyncio.sleep(delay_s)
                batch = self._valid(batch)
            except RevisionConflict as error:
                log.warning("%s: %s; giving the batch back", self._name, error, extra={"batch": len(batch)})
                self._on_conflict()
                self._broker.requeue(batch)
                await asyncio.sleep(CONFLICT_PAUSE_S)
                return None
            except Exception as error:
                self._on_failure()
                return await self._isolate(batch, error)
            else:
                self._broker.ack(batch)
                self._metrics.handled(self._name, len(batch))
                return None
        return None

    async def _attempt(self, batch: list[Delivery]) -> None:
        loop = asyncio.get_running_loop()
        began = loop.time()
        try:
            await self._process(batch)
        finally:
            self._metrics.batch(self._name, len(batch), loop.time() - began)

    async def _isolate(self, batch: list[Delivery], error: Exception) -> None:
        if len(batch) > 1:
            log.warning("%s: a batch failed (%r); one by one", self._name, error, extra={"batch": len(batch)})
            for delivery in batch:
                await self._settle(self._valid([delivery]))
            return
        log.error("%s: a message failed and goes to %s", self._name, DEAD, exc_info=error)
        await self._dead_letter(batch[0], f"{type(error).__name__}: {error}")

    async def _dead_letter(self, delivery: Delivery, reason: str) -> None:
        backoff = Backoff()
        while not self._broker.is_void(delivery):
            try:
                await dead_letter(self._broker, delivery, reason, self._metrics, self._name)
            except BrokerUnavailable:
                if self._stopping or self._resting:
                    return self._broker.requeue([delivery])
                await asyncio.sleep(backoff.next_s())
            else:
                self._broker.ack([delivery])
                return None
        return None


async def dead_letter(broker: Broker, delivery: Delivery, reason: str, metrics: ServiceMetrics, name: str) -> None:
    """Publish a copy to ``sublet.dead`` with what is needed to put it back. The caller acknowledges the original.

    Raises:
        BrokerUnavailable: not confirmed.
    """
    await broker.publish([dead_letter_message(delivery, reason)])
    metrics.dead_lettered(name)


def dead_letter_message(delivery: Delivery, reason: str) -> Outgoing:
    """What was delivered can be anything that AMQP knows; what is published here can be encoded, whatever it was."""
    headers = {
        **_headers_kept(delivery.headers),
        "x-sublet-reason": _encodable(reason[:REASON_MAX_CHARS]),
        "x-sublet-exchange": delivery.exchange,
        "x-sublet-routing-key": _short(delivery.routing_key),
    }
    message_id = None if delivery.message_id is None else _short(delivery.message_id)
    return Outgoing(DEAD, _short(delivery.routing_key), delivery.body, message_id=message_id, headers=headers)


def _headers_kept(headers: Mapping[str, object]) -> dict[str, object]:
    kept: dict[str, object] = {}
    room = LETTER_HEADERS_MAX_BYTES
    for name, value in headers.items():
        plain = _plain(value)
        room -= _weight(name) + _weight(plain)
        if room < 0:
            kept["x-sublet-headers-left-out"] = len(headers) - len(kept)
            break
        kept[_encodable(name)] = plain
    return kept


def _plain(value: object) -> object:
    """What is no JSON value as text."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return value if -(2**63) <= value < 2**63 else str(value)
    if isinstance(value, bytes | bytearray):
        return bytes(value).decode(errors="backslashreplace")
    if isinstance(value, Mapping):
        return {_encodable(str(name)): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return _encodable(str(value))


def _weight(value: object) -> int:
    """At least as many bytes as it takes in an AMQP frame."""
    own = 16
    if isinstance(value, str):
        return own + len(_encodable(value).encode())
    if isinstance(value, Mapping):
        return own + sum(_weight(name) + _weight(item) for name, item in value.items())
    if isinstance(value, list):
        return own + sum(map(_weight, value))
    return own


def _encodable(text: str) -> str:
    """Lone surrogates stand for bytes that were no UTF-8."""
    return text.encode(errors="backslashreplace").decode()


def _short(text: str) -> str:
    return _encodable(text).encode()[:_SHORT_TEXT_MAX_BYTES].decode(errors="ignore")
