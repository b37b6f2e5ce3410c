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
class AShard:
    held: bool = True
    in_line: bool = True
    broker_is_away: bool = False
    joined: list[str] = field(default_factory=list)

    def active(self) -> bool:
        return self.held

    async def join(self) -> None:
        if not self.in_line:
            if self.broker_is_away:
                raise BrokerUnavailable("not connected")
            self.in_line = True
            self.joined.append("again")

    async def yield_shard(self) -> None:
        self.held = self.in_line = False
        await self.join()


class Beats:
    """All schedulers are alive."""

    def __init__(self, schedulers: int, clock: ManualClock) -> None:
        self._alive = {str(number): clock.now() for number in range(schedulers)}

    async def beat(self, scheduler: str, now: float) -> dict[str, float]:
        return self._alive


@pytest.fixture
def shards(monkeypatch: pytest.MonkeyPatch) -> list[AShard]:
    monkeypatch.setattr(balancer, "REBALANCE_INTERVAL_S", 0.01)
    return [AShard() for _ in range(4)]


def start(shards: list[AShard], schedulers: int, clock: ManualClock) -> asyncio.Task[None]:
    beats: Any = Beats(schedulers, clock)
    return asyncio.create_task(ShardBalancer("0", shards, store=beats, clock=clock).run())


async def test_who_holds_more_than_its_share_requeues_the_surplus(shards: list[AShard], clock: ManualClock) -> None:
    task = start(shards, 2, clock)
    await until(lambda: sum(shard.held for shard in shards) == 2, "two are left")
    await asyncio.sleep(0.05)
    assert [shard.held for shard in shards] == [True, True, False, False]
    assert all(shard.in_line for shard in shards)
    task.cancel()


async def test_who_could_not_join_a_line_again_tries_until_it_has(shards: list[AShard], clock: ManualClock) -> None:
    shards[3].broker_is_away = True
    task = start(shards, 2, clock)
    await until(lambda: not shards[3].in_line, "it has left the line")
    await asyncio.sleep(0.05)
    assert not task.done()
    shards[3].broker_is_away = False
    await until(lambda: shards[3].joined, "it is in the line again")
    await until(lambda: sum(shard.held for shard in shards) == 2, "the sharing goes on")
    task.cancel()
