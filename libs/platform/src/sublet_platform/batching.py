"""Batches of deliveries: the deliveries that have arrived are handled together and acknowledged after success.

A batch begins as soon as the loop is idle. The deliveries that arrive meanwhile form the next batch.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable

from sublet_platform.dead_letters import dead_letter
from sublet_platform.metrics import ServiceMetrics
from sublet_platform.ports import (
    Broker,
    BrokerUnavailable,
    Delivery,
    Process,
    RevisionConflict,
    StoreUnavailable,
)
from sublet_protocol import limits
from sublet_protocol.backoff import Backoff
from sublet_protocol.topology import DEAD

logger = logging.getLogger(__name__)

CONFLICT_PAUSE_S = 0.05
"""After a conflict the messages are redelivered at once, perhaps to this process. The pause prevents a busy loop until
RabbitMQ has settled on one owner."""


def _nothing() -> None:
    """The default: there is no cache to drop."""


class BatchLoop:
    """Hands batches of deliveries to ``process`` and settles them.

    * success: acknowledged.
    * StoreUnavailable, BrokerUnavailable: ``on_failure()`` (drop caches, because it is unknown what was written), a
      growing delay, then a retry of the deliveries whose channel is still open.
    * RevisionConflict: ``on_conflict()``, and the deliveries are requeued.
    * any other exception: ``on_failure()``, then a retry one by one. A message that fails alone is dead-lettered.
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
        self._pending: deque[Delivery] = deque()
        self._wake_up = asyncio.Event()
        self._stopping = False
        self._is_paused = False
        self._idle = asyncio.Event()
        """Set while no batch is in progress."""
        self._idle.set()
        self._task: asyncio.Task[None] | None = None

    def handle(self, delivery: Delivery) -> None:
        """Accept a delivery. This is the handler to consume with."""
        self._pending.append(delivery)
        self._wake_up.set()

    def start(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._run(), name=f"batches of {self._name}")

    async def stop(self) -> None:
        """Handle everything that has arrived, then stop. While a server is unavailable, requeue it instead."""
        self._stopping = True
        self._wake_up.set()
        if self._task is not None:
            await self._task

    async def rest(self) -> None:
        """Wait until the current batch is settled. No other batch begins before `resume`.

        A process that yields as the single active consumer calls this and then closes its channel. So the next
        consumer is served exactly the messages that were not handled here, after all others have been settled.
        """
        self._is_paused = True
        await self._idle.wait()

    def resume(self) -> None:
        self._is_paused = False
        self._wake_up.set()

    @property
    def alive(self) -> bool:
        return self._task is not None and not self._task.done()

    async def _run(self) -> None:
        while True:
            await self._wake_up.wait()
            while self._pending and not self._is_paused:
                self._idle.clear()
                await self._settle(self._take())
            self._idle.set()
            if self._stopping:
                return
            self._wake_up.clear()

    def _take(self) -> list[Delivery]:
        """The deliveries of the next batch: at least one, within the limits of items and bytes."""
        taken = [self._pending.popleft()]
        size = len(taken[0].body)
        while self._pending and len(taken) < self._max_items:
            size += len(self._pending[0].body)
            if size > self._max_bytes:
                break
            taken.append(self._pending.popleft())
        return self._valid(taken)

    def _valid(self, deliveries: list[Delivery]) -> list[Delivery]:
        return [delivery for delivery in deliveries if not self._broker.is_void(delivery)]

    async def _settle(self, batch: list[Delivery]) -> None:
        """Retry until the batch is acknowledged, requeued, void or dead-lettered."""
        backoff = Backoff()
        while batch:
            try:
                await self._attempt(batch)
            except (StoreUnavailable, BrokerUnavailable) as error:
                self._on_failure()
                if self._stopping or self._is_paused:
                    return self._broker.requeue(batch)
                delay_s = backoff.next_s()
                logger.warning("%s: %s; retrying in %.1f s", self._name, error, delay_s, extra={"batch": len(batch)})
                await asyncio.sleep(delay_s)
                batch = self._valid(batch)
            except RevisionConflict as error:
                logger.warning("%s: %s; requeueing the batch", self._name, error, extra={"batch": len(batch)})
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
            logger.warning(
                "%s: a batch failed (%r); retrying one by one",
                self._name,
                error,
                extra={"batch": len(batch)},
            )
            for delivery in batch:
                await self._settle(self._valid([delivery]))
            return
        logger.error("%s: a message failed; dead-lettering it to %s", self._name, DEAD, exc_info=error)
        await self._dead_letter(batch[0], f"{type(error).__name__}: {error}")

    async def _dead_letter(self, delivery: Delivery, reason: str) -> None:
        backoff = Backoff()
        while not self._broker.is_void(delivery):
            try:
                await dead_letter(self._broker, delivery, reason, self._metrics, self._name)
            except BrokerUnavailable:
                if self._stopping or self._is_paused:
                    return self._broker.requeue([delivery])
                await asyncio.sleep(backoff.next_s())
            else:
                self._broker.ack([delivery])
                return None
        return None
