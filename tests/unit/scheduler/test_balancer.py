"""A scheduler's fair share of the shards."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

import pytest

from sublet_platform.ports import BrokerUnavailable
from sublet_scheduler import balancer
from sublet_scheduler.balancer import ShardBalancer
from support.clocks import ManualClock
from support.polling import until


@dataclass
class FakeShard:
    held: bool = True
    consuming: bool = True
    broker_is_away: bool = False
    joined: list[str] = field(default_factory=list)

    def active(self) -> bool:
        return self.held

    async def join(self) -> None:
        if not self.consuming:
            if self.broker_is_away:
                raise BrokerUnavailable("not connected")
            self.consuming = True
            self.joined.append("again")

    async def yield_shard(self) -> None:
        self.held = self.consuming = False
        await self.join()


class Beats:
    """A store in which all schedulers are live."""

    def __init__(self, schedulers: int, clock: ManualClock) -> None:
        self._alive = {str(number): clock.now() for number in range(schedulers)}

    async def beat(self, scheduler: str, now: float) -> dict[str, float]:
        return self._alive


@pytest.fixture
def shards(monkeypatch: pytest.MonkeyPatch) -> list[FakeShard]:
    monkeypatch.setattr(balancer, "REBALANCE_INTERVAL_S", 0.01)
    return [FakeShard() for _ in range(4)]


def start(shards: list[FakeShard], schedulers: int, clock: ManualClock) -> asyncio.Task[None]:
    beats: Any = Beats(schedulers, clock)
    return asyncio.create_task(ShardBalancer("0", shards, store=beats, clock=clock).run())


async def test_a_scheduler_with_more_than_its_share_yields_the_surplus(
    shards: list[FakeShard], clock: ManualClock
) -> None:
    task = start(shards, 2, clock)
    await until(lambda: sum(shard.held for shard in shards) == 2, "two are left")
    await asyncio.sleep(0.05)
    assert [shard.held for shard in shards] == [True, True, False, False]
    assert all(shard.consuming for shard in shards)
    task.cancel()


async def test_a_scheduler_retries_until_it_consumes_the_queue_again(
    shards: list[FakeShard], clock: ManualClock
) -> None:
    shards[3].broker_is_away = True
    task = start(shards, 2, clock)
    await until(lambda: not shards[3].consuming, "the consumer is closed")
    await asyncio.sleep(0.05)
    assert not task.done()
    shards[3].broker_is_away = False
    await until(lambda: shards[3].joined, "it is in the line again")
    await until(lambda: sum(shard.held for shard in shards) == 2, "the next rebalance")
    task.cancel()
