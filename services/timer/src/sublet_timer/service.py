"""The timer as it runs: takes timers in, fires them when they are due, and ticks.

**Which of several instances fires and ticks.** A single active consumer is not told that it is one. So every instance
sends an empty message to the timers' own queue each second; only the active one receives them, its own and those of
the others. Who has heard nothing for three seconds is not active (or not any more). Correctness does not hang on it:
a timer that two instances fire, or a tick from two, does no harm, because receivers are idempotent.

**What another instance may have changed.** Deliveries on a new channel mean that another instance may have been
active in between: the horizon is forgotten and loaded again from the store. A timer that was missed nevertheless is
found when the next page is loaded, `HORIZON_S` later at most, and counted as a finding.
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
"""How far ahead timers are loaded: seldom enough to cost nothing, and how late a timer that was missed can be."""

HORIZON_CAPACITY = 10_000
"""Timers loaded at once; at most twice that are kept in memory."""

FIRE_MAX = 2_000
"""Timers fired at once: published together, then deleted together."""

ACTIVE_LAPSE_S = 3.0
"""Three probes unheard: somebody else is active, or nobody."""

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
        self._store_and_horizon = asyncio.Lock()
        """Held from a change or a look at the store until the horizon agrees with it."""
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
        self._begin(self._tick_each_second())

    async def stop(self) -> None:
        """Whatever is in hand goes back to the queue at once, and its next consumer learns of every timer by it."""
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
        """This instance receives the messages for timers."""
        loop = asyncio.get_running_loop()
        return self._heard_at is not None and loop.time() - self._heard_at <= ACTIVE_LAPSE_S

    # --- timers come in ---------------------------------------------------------------------------------------

    def handle(self, delivery: Delivery) -> None:
        """The handler to consume with."""
        self._heard_at = asyncio.get_running_loop().time()
        self._batches.handle(delivery)

    def drop(self) -> None:
        """Nobody knows what was written: the horizon has to be loaded again."""
        self._channel = None

    async def process(self, deliveries: list[Delivery]) -> None:
        """Handle a batch whole. Raises StoreUnavailable or BrokerUnavailable; then it has to be handled again."""
        messages, refused = _read(deliveries)
        changes = plan(messages)
        now = self._clock.now()
        # The message is not acknowledged before the timer has fired, so one that is due needs no place in the store.
        due = [_stored(message) for message in changes.set if message.due <= now]
        later = [_stored(message) for message in changes.set if message.due > now]
        async with self._store_and_horizon:
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

    # --- timers come due --------------------------------------------------------------------------------------

    async def _fire_when_due(self) -> None:
        backoff = Backoff()
        while True:
            await self._until_something_is_due()
            try:
                await self.fire_due()
                backoff.reset()
            except (StoreUnavailable, BrokerUnavailable) as error:
                logger.warning("timers not fired, trying again: %s", error)
                await asyncio.sleep(backoff.next_s())
            except Exception:
                # Whatever it is, those who sleep depend on this loop.
                logger.exception("timers not fired, trying again")
                await asyncio.sleep(backoff.next_s())

    async def _until_something_is_due(self) -> None:
        """Wakes at the time of the next timer, and once a second, should the wall's clock have been set."""
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
        """Fire what is due, then load the next page if the horizon has been reached.

        Raises StoreUnavailable or BrokerUnavailable; what was not fired remains due.
        """
        while due := self._horizon.take_due(self._clock.now(), FIRE_MAX):
            try:
                await self._publish(due)
                await self._store.change_timers([], [timer.id for timer in due])
            except BaseException:
                self._horizon.put_back(due)
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
        async with self._store_and_horizon:
            until = self._clock.now() + HORIZON_S
            page = await self._store.due_timers(until, HORIZON_CAPACITY)
            strays = self._horizon.extend(page, until, HORIZON_CAPACITY)
        if strays:
            logger.warning(
                "timers that were missed: %s", [timer.id for timer in strays[:10]], extra={"count": len(strays)}
            )
            self._metrics.count_anomalies("timers", len(strays))
        self._timer_metrics.pending.set(await self._store.count_timers())

    # --- time passes ------------------------------------------------------------------------------------------

    async def _tick_each_second(self) -> None:
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
