"""The timer service: it stores timers, fires them when they are due, and publishes a tick each second.

**Active and standby instances.** RabbitMQ does not tell a consumer that it is the single active one. So every instance
sends an empty message (a probe) to the queue of the timers each second. Only the active instance receives the probes,
its own and those of the others. An instance that has received nothing for three seconds is a standby. Correctness does
not depend on this: receivers are idempotent, so two instances may fire the same timer or tick at the same time.

**Changes by another instance.** Deliveries on a new channel mean that another instance may have been active in between.
Then the horizon is dropped and loaded again from the store. A timer that is missed nevertheless is found when the next
page is loaded, at most `HORIZON_S` later, and counted as an anomaly.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Coroutine, Hashable, Sequence
from typing import Any

from sublet_engine.timer.horizon import Horizon, plan
from sublet_platform.batching import BatchLoop
from sublet_platform.dead_letters import dead_letter
from sublet_platform.metrics import ServiceMetrics
from sublet_platform.ports import (
    Broker,
    BrokerUnavailable,
    Clock,
    Consumer,
    Delivery,
    Outgoing,
    StoredTimer,
    StoreUnavailable,
    TimerStore,
)
from sublet_protocol import ids, limits
from sublet_protocol.backoff import Backoff
from sublet_protocol.chunking import pack
from sublet_protocol.messages import CancelTimer, MalformedMessage, SetTimer, Tick, TimerFired, decode_for_timer, encode
from sublet_protocol.topology import REQUESTS, TIMERS, run_key, shard_key
from sublet_timer.metrics import TimerMetrics

logger = logging.getLogger(__name__)

HORIZON_S = 30.0
"""How far ahead timers are loaded. It is also the longest delay of a timer that was missed."""

HORIZON_CAPACITY = 10_000
"""Timers in one page. At most twice as many are in memory."""

FIRE_MAX = 2_000
"""Timers that are published together and then deleted together."""

ACTIVE_LAPSE_S = 3.0
"""An instance without deliveries for this long (three probes) is a standby."""

_PROBE = encode([])


class TimerService:
    def __init__(
        self,
        *,
        store: TimerStore,
        broker: Broker,
        clock: Clock,
        shards: int,
        metrics: ServiceMetrics,
        timer_metrics: TimerMetrics,
    ) -> None:
        self._store, self._broker, self._clock = store, broker, clock
        self._metrics, self._timer_metrics = metrics, timer_metrics
        self._shards = shards
        self._tick_keys = [shard_key(shard, shards) for shard in range(shards)]
        self._horizon: Horizon[StoredTimer] = Horizon(HORIZON_CAPACITY)
        self._horizon_lock = asyncio.Lock()
        """Held during each change or query of the store, until the horizon agrees with the store."""
        self._changed = asyncio.Event()
        self._channel: Hashable = None
        self._heard_at: float | None = None
        self._batches = BatchLoop(self.process, broker, metrics, name="timers", on_failure=self.drop)
        self._consumer: Consumer | None = None
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Raises BrokerUnavailable."""
        self._batches.start()
        self._consumer = await self._broker.consume(TIMERS, self.handle, prefetch=limits.RUN_PREFETCH)
        self._begin(self._fire_when_due())
        self._begin(self._tick_periodically())

    async def stop(self) -> None:
        """Stop at once. Unacknowledged messages are requeued, so the next consumer receives every timer."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._consumer is not None:
            await self._consumer.close()
        await self._batches.stop()

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        self._tasks.append(asyncio.get_running_loop().create_task(work))

    @property
    def alive(self) -> bool:
        return self._batches.alive and not any(task.done() for task in self._tasks)

    @property
    def active(self) -> bool:
        """This instance is the active one."""
        loop = asyncio.get_running_loop()
        return self._heard_at is not None and loop.time() - self._heard_at <= ACTIVE_LAPSE_S

    # --- incoming messages ------------------------------------------------------------------------------------

    def handle(self, delivery: Delivery) -> None:
        """Accept a delivery. This is the handler to consume with."""
        self._heard_at = asyncio.get_running_loop().time()
        self._batches.handle(delivery)

    def drop(self) -> None:
        """Load the horizon again with the next batch, because it is unknown what was written."""
        self._channel = None

    async def process(self, deliveries: list[Delivery]) -> None:
        """Handle a whole batch. Raises StoreUnavailable or BrokerUnavailable; then it must be handled again."""
        messages, refused = _read(deliveries)
        changes = plan(messages)
        now = self._clock.now()
        # The message is acknowledged only after its timer has fired, so a timer that is due need not be stored.
        due = [_stored(message) for message in changes.set if message.due <= now]
        later = [_stored(message) for message in changes.set if message.due > now]
        async with self._horizon_lock:
            self._begin_ownership(deliveries)
            if later or changes.cancel:
                await self._store.change_timers(later, changes.cancel)
            self._horizon.remove(changes.cancel)
            self._horizon.add(later)
        self._changed.set()
        await self._publish(due)
        for delivery, reason in refused:
            await dead_letter(self._broker, delivery, reason, self._metrics, "timers")

    def _begin_ownership(self, deliveries: Sequence[Delivery]) -> None:
        channel = deliveries[-1].channel
        if channel != self._channel:
            self._horizon.forget()
            self._channel = channel

    # --- due timers -------------------------------------------------------------------------------------------

    async def _fire_when_due(self) -> None:
        backoff = Backoff()
        while True:
            await self._wait_until_due()
            try:
                await self.fire_due()
                backoff.reset()
            except (StoreUnavailable, BrokerUnavailable) as error:
                logger.warning("timers not fired; retrying: %s", error)
                await asyncio.sleep(backoff.next_s())
            except Exception:
                # The loop must continue after any error, because all sleeping tasks depend on it.
                logger.exception("timers not fired; retrying")
                await asyncio.sleep(backoff.next_s())

    async def _wait_until_due(self) -> None:
        """Wait until the next timer is due. Check once a second, in case the wall clock was set."""
        while True:
            self._changed.clear()
            delay_s = limits.TICK_INTERVAL_S
            if self.active:
                delay_s = min(delay_s, self._horizon.next_at() - self._clock.now())
            if delay_s <= 0:
                return
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(delay_s):
                    await self._changed.wait()

    async def fire_due(self) -> None:
        """Fire the due timers, then load the next page if the horizon has been reached.

        Raises StoreUnavailable or BrokerUnavailable; the timers that were not fired remain due.
        """
        while due := self._horizon.take_due(self._clock.now(), FIRE_MAX):
            try:
                await self._publish(due)
                await self._store.change_timers([], [timer.id for timer in due])
            except BaseException:
                self._horizon.return_unfired(due)
                raise
        if self._horizon.until <= self._clock.now():
            await self._load()

    async def _publish(self, timers: Sequence[StoredTimer]) -> None:
        if not timers:
            return
        fired = (
            (
                run_key(ids.run_of(each.task_run_id), self._shards),
                TimerFired(each.task_run_id, each.operation_id, each.key),
            )
            for each in timers
        )
        await self._broker.publish([Outgoing(REQUESTS, key, body) for key, body in pack(fired)])
        now = self._clock.now()
        for timer in timers:
            self._timer_metrics.lag_seconds.observe(now - timer.due)

    async def _load(self) -> None:
        async with self._horizon_lock:
            until = self._clock.now() + HORIZON_S
            page = await self._store.due_timers(until, HORIZON_CAPACITY)
            missed = self._horizon.extend(page, until, HORIZON_CAPACITY)
        if missed:
            logger.warning(
                "timers fired late, because the horizon had missed them: %s",
                [timer.id for timer in missed[:10]],
                extra={"count": len(missed)},
            )
            self._metrics.count_anomalies("timers", len(missed))
        self._timer_metrics.pending.set(await self._store.count_timers())

    # --- ticks ------------------------------------------------------------------------------------------------

    async def _tick_periodically(self) -> None:
        while True:
            messages = [Outgoing("", TIMERS, _PROBE, persistent=False)]
            if self.active:
                tick = encode([Tick(at=self._clock.now())])
                messages += [Outgoing(REQUESTS, key, tick, persistent=False) for key in self._tick_keys]
            self._broker.publish_nowait(messages)
            await asyncio.sleep(limits.TICK_INTERVAL_S)


def _read(deliveries: Sequence[Delivery]) -> tuple[list[SetTimer | CancelTimer], list[tuple[Delivery, str]]]:
    messages: list[SetTimer | CancelTimer] = []
    refused: list[tuple[Delivery, str]] = []
    for delivery in deliveries:
        try:
            messages += decode_for_timer(delivery.body)
        except MalformedMessage as error:
            refused.append((delivery, f"not a message for the timer: {error}"))
    return messages, refused


def _stored(message: SetTimer) -> StoredTimer:
    return StoredTimer(message.id, message.due, message.task_run_id, message.operation_id, message.key)
