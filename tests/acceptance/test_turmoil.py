"""Everything dies in turn, in an order that a seed decides: every run still ends, once, with the right result."""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import pytest

from acceptance.lab import Lab, eventually
from acceptance.leftovers import leftovers
from acceptance.processes import Process
from acceptance.stack import SERVICES, Stack
from acceptance.voyages import everybody_arrives, sail
from servers import MongoServer, RabbitServer

pytestmark = pytest.mark.real

BLOWS = int(os.environ.get("SUBLET_TEST_BLOWS", "6"))
WORKFLOWS = ("voyage", "double", "await_payment", "fan_out", "stumble", "release")


class Turmoil:
    """Strikes processes and servers, and starts them again."""

    def __init__(self, lab: Lab, stack: Stack, seed: int) -> None:
        self._lab = lab
        self._stack = stack
        self._random = random.Random(seed)
        self._workers: list[Process] = []
        self.told: list[str] = []

    async def begin(self) -> None:
        for _ in range(2):
            self._start_worker()
        for worker in self._workers:
            await asyncio.to_thread(worker.wait_until_ready)
        self._stack.launch("scheduler").wait_until_ready()

    async def strike(self) -> None:
        blow: Callable[[], Awaitable[None]] = self._random.choice(
            [self._kill_worker, self._stop_worker, self._kill_service, self._kill_service, self._freeze, self._server]
        )
        await blow()

    def _start_worker(self) -> None:
        self._workers.append(self._lab.launch_worker(*WORKFLOWS, slots=4, durable_slots=4))

    async def _kill_worker(self) -> None:
        worker = self._workers.pop(self._random.randrange(len(self._workers)))
        self.told.append(f"killed {worker}")
        worker.kill()
        self._start_worker()

    async def _stop_worker(self) -> None:
        worker = self._workers.pop(self._random.randrange(len(self._workers)))
        self.told.append(f"stopped {worker}")
        worker.terminate()
        self._start_worker()

    async def _kill_service(self) -> None:
        process = self._random.choice(self._stack.of(self._random.choice(SERVICES)))
        self.told.append(f"killed {process}")
        process.kill()
        await self._pause()
        process.start()

    async def _freeze(self) -> None:
        process = self._random.choice([*self._workers, *(p for name in SERVICES for p in self._stack.of(name))])
        self.told.append(f"froze {process}")
        process.pause()
        await self._pause()
        await self._pause()
        process.go_on()

    async def _server(self) -> None:
        servers: list[RabbitServer | MongoServer] = [self._stack.rabbit, self._stack.mongo]
        server = self._random.choice(servers)
        self.told.append(f"killed {server.name}")
        await asyncio.to_thread(server.kill)
        await self._pause()
        await asyncio.to_thread(server.start)

    async def _pause(self) -> None:
        await asyncio.sleep(self._random.uniform(0.0, 3.0))


class Load:
    """Runs of every sort, and what each must give."""

    def __init__(self, lab: Lab) -> None:
        self._lab = lab
        self._voyages: dict[int, Any] = {}
        self._others: list[tuple[Any, Callable[[Any], bool]]] = []
        self._first = 0
        lab.ledger.open_gate("")  # for those who have released their slot

    async def add(self) -> None:
        self._first += 1_000
        w = self._lab.workflows
        self._voyages |= await sail(self._lab, 20, self._first)
        for n in range(self._first, self._first + 5):
            self._expect(await w.await_payment.aio_run(w.Number(n=n), wait_for_result=False), partial(_is_for, n))
        for n in range(self._first, self._first + 5):
            await self._lab.client.event.aio_push("paid", {"order": n, "amount": 1})
        self._expect(await w.fan_out.aio_run(w.Number(n=10), wait_for_result=False), lambda total: total.n == 90)
        self._expect(await w.stumble.aio_run(wait_for_result=False), lambda receipt: receipt.n >= 1)
        for then in ("return", "fail once"):
            self._expect(
                await w.release.aio_run(w.Release(then=then), wait_for_result=False), lambda where: bool(where.worker)
            )

    async def arrive(self) -> None:
        await everybody_arrives(self._voyages)
        results = await asyncio.gather(*(run.aio_result() for run, _ in self._others))
        assert all(is_right(result) for result, (_, is_right) in zip(results, self._others, strict=True)), results
        assert set(self._lab.ledger.values("landed", "n")) == set(self._voyages)

    def _expect(self, run: Any, is_right: Callable[[Any], bool]) -> None:
        self._others.append((run, is_right))


def _is_for(order: int, paid: Any) -> bool:
    return bool(paid.order == order)


@pytest.mark.parametrize("seed", [int(seed) for seed in os.environ.get("SUBLET_TEST_SEEDS", "1").split(",")])
async def test_every_run_ends_right_whatever_dies(lab: Lab, mended_stack: Stack, seed: int) -> None:
    async def nothing_is_left_behind() -> bool:
        return not await leftovers(mended_stack)

    turmoil, load = Turmoil(lab, mended_stack, seed), Load(lab)
    await turmoil.begin()
    await load.add()
    try:
        for _ in range(BLOWS):
            await turmoil.strike()
            await load.add()
        await load.arrive()
        await eventually(nothing_is_left_behind, "no timer and no wait is left behind")
    except BaseException:
        print(*turmoil.told, *await lab.unfinished(), sep="\n")
        raise
