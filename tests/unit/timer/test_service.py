"""The timer service on ports in memory, in virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from sublet_platform.memory import MemoryBroker, MemoryCluster, MemoryDatabase, MemoryTimerStore
from sublet_platform.metrics import ServiceMetrics, new_registry
from sublet_platform.ports import Delivery, Outgoing, StoredTimer, StoreUnavailable
from sublet_protocol import ids, limits
from sublet_protocol.messages import CancelTimer, Record, SetTimer, Tick, TimerFired, decode_for_shard, encode
from sublet_protocol.topology import DEAD, TIMERS, shard_queue, topology
from sublet_timer import service as service_module
from sublet_timer.metrics import TimerMetrics
from sublet_timer.service import HORIZON_S, TimerService
from support.virtual_time import EPOCH_S, VirtualClock, in_virtual_time

SHARDS = 2


class Instance:
    """One timer process: its connection, metrics and service."""

    def __init__(self, harness: TimerHarness) -> None:
        self.broker = MemoryBroker(harness.cluster)
        self.metrics = ServiceMetrics(new_registry())
        self.timer_metrics = TimerMetrics(self.metrics)
        self.service = TimerService(
            store=MemoryTimerStore(harness.database),
            broker=self.broker,
            clock=harness.clock,
            shards=SHARDS,
            metrics=self.metrics,
            timer_metrics=self.timer_metrics,
        )

    def value(self, metric: str, **labels: str) -> float | None:
        return self.metrics.registry.get_sample_value(metric, labels)


class TimerHarness:
    """A broker, a database, and the messages that arrive at the shards."""

    def __init__(self) -> None:
        self.cluster = MemoryCluster()
        self.cluster.declare(topology(SHARDS))
        self.database = MemoryDatabase()
        self.clock = VirtualClock()
        self.user = MemoryBroker(self.cluster)
        self.fired: list[tuple[str, float]] = []
        """Pairs of a task run id and the seconds since the start."""
        self.ticks: dict[int, list[float]] = {shard: [] for shard in range(SHARDS)}
        self.bodies = 0
        self.dead: list[Delivery] = []

    @classmethod
    async def begin(cls, instances: int = 1) -> tuple[TimerHarness, list[Instance]]:
        harness = cls()
        for shard in range(SHARDS):
            await harness.user.consume(shard_queue(shard), harness._receiver(shard), prefetch=1_000)
        await harness.user.consume(DEAD, harness._dead_letter, prefetch=10)
        started = [Instance(harness) for _ in range(instances)]
        for instance in started:
            await instance.service.start()
        await asyncio.sleep(0.01)
        return harness, started

    def _receiver(self, shard: int):  # type: ignore[no-untyped-def]
        def receive(delivery: Delivery) -> None:
            at = round(self.clock.now() - EPOCH_S, 3)
            for message in decode_for_shard(delivery.body):
                if isinstance(message, Tick):
                    self.ticks[shard].append(at)
                else:
                    assert isinstance(message, TimerFired)
                    assert ids.bucket_of(ids.run_of(message.task_run_id)) in ids.buckets_of_shard(shard, SHARDS)
                    self.fired.append((message.task_run_id, at))
            self.bodies += not any(isinstance(m, Tick) for m in decode_for_shard(delivery.body))
            self.user.ack([delivery])

        return receive

    def _dead_letter(self, delivery: Delivery) -> None:
        self.dead.append(delivery)
        self.user.ack([delivery])

    async def send(self, *messages: Record) -> None:
        await self.user.publish([Outgoing("", TIMERS, encode(messages))])

    @property
    def fired_ids(self) -> list[str]:
        return [task_run for task_run, _ in self.fired]


def sleeper(name: str, due_in_s: float) -> SetTimer:
    return SetTimer(id=f"timer-{name}", due=EPOCH_S + due_in_s, task_run_id=name, operation_id="1", key="sleep")


async def stop(instances: Sequence[Instance]) -> None:
    for instance in instances:
        await instance.service.stop()
        await instance.broker.close()


@in_virtual_time
async def test_a_timer_fires_when_it_is_due_and_is_deleted() -> None:
    harness, instances = await TimerHarness.begin()
    await harness.send(sleeper("a.t", 5.0), sleeper("b.t", 2.5), sleeper("c.t", 100.0))
    await asyncio.sleep(3)
    assert harness.fired_ids == ["b.t"]
    await asyncio.sleep(200)
    assert harness.fired_ids == ["b.t", "a.t", "c.t"]
    for (_, at), due in zip(harness.fired, (2.5, 5.0, 100.0), strict=True):
        assert due <= at < due + 0.01
    assert harness.database.timers == {}
    await stop(instances)


@in_virtual_time
async def test_a_timer_that_is_due_already_fires_at_once_and_is_not_stored() -> None:
    harness, instances = await TimerHarness.begin()
    written: list[str] = []

    async def watch(operation: str) -> None:
        written.append(operation)

    harness.database.before = watch
    await harness.send(sleeper("a.t", -60.0))
    await asyncio.sleep(0.01)
    assert harness.fired_ids == ["a.t"]
    assert "change_timers" not in written
    await stop(instances)


@in_virtual_time
async def test_a_cancelled_timer_does_not_fire() -> None:
    harness, instances = await TimerHarness.begin()
    await harness.send(sleeper("a.t", 5.0), sleeper("b.t", 5.0), CancelTimer(id="timer-b.t"))
    await asyncio.sleep(1)
    await harness.send(CancelTimer(id="timer-a.t"))
    await asyncio.sleep(60)
    assert harness.fired == []
    assert harness.database.timers == {}
    await stop(instances)


@in_virtual_time
async def test_a_timer_that_is_cancelled_and_set_again_in_one_batch_fires() -> None:
    harness, instances = await TimerHarness.begin()
    await harness.send(sleeper("a.t", 50.0))
    await asyncio.sleep(1)
    await harness.send(CancelTimer(id="timer-a.t"), sleeper("a.t", 50.0))
    await asyncio.sleep(100)
    assert harness.fired_ids == ["a.t"]
    assert harness.database.timers == {}
    await stop(instances)


@in_virtual_time
async def test_the_same_timer_set_twice_fires_once_at_the_first_time() -> None:
    harness, instances = await TimerHarness.begin()
    await harness.send(sleeper("a.t", 5.0))
    await asyncio.sleep(1)
    await harness.send(sleeper("a.t", 5.0))
    await asyncio.sleep(60)
    assert harness.fired_ids == ["a.t"]
    await stop(instances)


@in_virtual_time
async def test_timers_that_are_due_together_share_a_message() -> None:
    harness, instances = await TimerHarness.begin()
    await harness.send(*(sleeper(f"{n}.t", 5.0) for n in range(1_000)))
    await asyncio.sleep(10)
    assert sorted(harness.fired_ids) == sorted(f"{n}.t" for n in range(1_000))
    assert harness.bodies <= ids.BUCKETS
    await stop(instances)


@in_virtual_time
async def test_every_shard_gets_a_tick_each_second() -> None:
    harness, instances = await TimerHarness.begin()
    await asyncio.sleep(10.5)
    for shard in range(SHARDS):
        assert len(harness.ticks[shard]) == 10
    await stop(instances)


@in_virtual_time
async def test_only_the_active_one_of_two_instances_ticks_and_fires() -> None:
    harness, instances = await TimerHarness.begin(instances=2)
    await harness.send(sleeper("a.t", 5.0))
    await asyncio.sleep(10.5)
    assert [instance.service.active for instance in instances] == [True, False]
    assert harness.fired_ids == ["a.t"]
    assert len(harness.ticks[0]) == 10
    await stop(instances)


@in_virtual_time
async def test_the_standby_takes_over_when_the_active_instance_stops() -> None:
    harness, instances = await TimerHarness.begin(instances=2)
    await harness.send(sleeper("a.t", 5.0), sleeper("b.t", 20.0))
    await asyncio.sleep(10)
    await stop(instances[:1])
    await asyncio.sleep(20)
    assert instances[1].service.active
    assert harness.fired_ids == ["a.t", "b.t"]
    assert len(harness.ticks[0]) >= 25
    await stop(instances[1:])


@in_virtual_time
async def test_a_timer_that_was_not_handled_before_the_stop_fires_in_time() -> None:
    harness, instances = await TimerHarness.begin(instances=2)
    await harness.send(sleeper("a.t", 5.0))
    await stop(instances[:1])
    await asyncio.sleep(5.5)
    assert harness.fired_ids == ["a.t"]
    await stop(instances[1:])


@in_virtual_time
async def test_a_restarted_instance_fires_the_timers_that_became_due_meanwhile() -> None:
    harness, instances = await TimerHarness.begin()
    await harness.send(sleeper("a.t", 5.0), sleeper("b.t", 60.0))
    await asyncio.sleep(1)
    await stop(instances)
    await asyncio.sleep(20)
    assert harness.fired == []
    again = Instance(harness)
    await again.service.start()
    await asyncio.sleep(0.1)
    assert harness.fired_ids == ["a.t"]
    await asyncio.sleep(60)
    assert harness.fired_ids == ["a.t", "b.t"]
    await stop([again])


@in_virtual_time
async def test_a_cut_connection_delays_timers_and_loses_none() -> None:
    harness, instances = await TimerHarness.begin()
    await harness.send(sleeper("a.t", 5.0))
    await asyncio.sleep(1)
    instances[0].broker.kill_connection(down_s=10.0)
    await harness.send(sleeper("b.t", 6.0))
    await asyncio.sleep(20)
    assert sorted(set(harness.fired_ids)) == ["a.t", "b.t"]
    assert harness.database.timers == {}
    await stop(instances)


@pytest.mark.parametrize("moment", ["before", "after"])
@in_virtual_time
async def test_no_timer_is_lost_while_the_store_is_unavailable(moment: str) -> None:
    harness, instances = await TimerHarness.begin()
    await harness.send(sleeper("a.t", 5.0))
    await asyncio.sleep(4)

    async def fail(operation: str) -> None:
        if harness.clock.now() < EPOCH_S + 15:
            raise StoreUnavailable("no primary")

    setattr(harness.database, moment, fail)
    await harness.send(sleeper("b.t", 7.0), CancelTimer(id="timer-unknown"))
    await asyncio.sleep(60)
    assert set(harness.fired_ids) == {"a.t", "b.t"}
    assert harness.database.timers == {}
    assert instances[0].service.alive
    await stop(instances)


@in_virtual_time
async def test_a_timer_that_was_fired_and_not_deleted_fires_again() -> None:
    harness, instances = await TimerHarness.begin()
    await harness.send(sleeper("a.t", 5.0))
    await asyncio.sleep(1)

    async def no_deletes(operation: str) -> None:
        if operation == "change_timers":
            raise StoreUnavailable("no primary")

    harness.database.before = no_deletes
    await asyncio.sleep(5)
    assert set(harness.fired_ids) == {"a.t"}
    assert len(harness.database.timers) == 1
    await stop(instances)


@in_virtual_time
async def test_more_timers_than_fit_into_memory_all_fire_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service_module, "HORIZON_CAPACITY", 10)
    harness, instances = await TimerHarness.begin()
    await harness.send(*(sleeper(f"{n}.t", 1.0 + n / 50) for n in range(500)))
    await asyncio.sleep(0.5)
    assert len(instances[0].service._horizon) <= 20
    await asyncio.sleep(20)
    assert len(harness.fired) == 500
    for name, at in harness.fired:
        due = round(1.0 + int(name.partition(".")[0]) / 50, 3)
        assert due <= at < due + 0.05
    await stop(instances)


@in_virtual_time
async def test_a_missed_timer_is_found_and_counted_as_an_anomaly() -> None:
    harness, instances = await TimerHarness.begin()
    await asyncio.sleep(5)
    lost = StoredTimer(id="lost", due=EPOCH_S + 10, task_run_id="a.t", operation_id="1", key="k")
    harness.database.timers["lost"] = lost
    await asyncio.sleep(HORIZON_S + 1)
    assert harness.fired_ids == ["a.t"]
    assert instances[0].value("sublet_sweeper_anomalies_total", sweeper="timers") == 1
    await stop(instances)


@in_virtual_time
async def test_an_invalid_message_is_dead_lettered_and_the_others_are_handled() -> None:
    harness, instances = await TimerHarness.begin()
    await harness.user.publish(
        [
            Outgoing("", TIMERS, b"no json"),
            Outgoing("", TIMERS, b'[{"t":"Unknown"}]'),
            Outgoing("", TIMERS, encode([sleeper("a.t", 1.0)])),
        ]
    )
    await asyncio.sleep(5)
    assert harness.fired_ids == ["a.t"]
    assert [letter.body for letter in harness.dead] == [b"no json", b'[{"t":"Unknown"}]']
    assert all("not a message for the timer" in str(letter.headers["x-sublet-reason"]) for letter in harness.dead)
    await stop(instances)


@in_virtual_time
async def test_a_clock_that_is_set_forward_makes_timers_due() -> None:
    harness, instances = await TimerHarness.begin()
    await harness.send(sleeper("a.t", 1_000.0))
    await asyncio.sleep(1)
    harness.clock.skew_s = 2_000.0
    await asyncio.sleep(2 * limits.TICK_INTERVAL_S)
    assert harness.fired_ids == ["a.t"]
    await stop(instances)


@in_virtual_time
async def test_the_number_of_stored_timers_is_a_metric() -> None:
    harness, instances = await TimerHarness.begin()
    await harness.send(sleeper("a.t", 1_000.0), sleeper("b.t", 2.0))
    await asyncio.sleep(2 * HORIZON_S)
    assert instances[0].value("sublet_timers_pending") == 1
    assert instances[0].value("sublet_timer_lag_seconds_count") == 1
    await stop(instances)
