"""A worker of a test: an ordinary one in memory, that can be killed, and whose tasks fail on demand."""

from __future__ import annotations

import asyncio
import copy
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

from sublet._client.config import ClientConfig
from sublet._declare.base import BaseWorkflow
from sublet._declare.standalone import Standalone
from sublet._declare.task import Task
from sublet._declare.types import EvictionPolicy
from sublet._worker.runner import Registration
from sublet._worker.worker import LifespanFn, Worker
from sublet.testing._loop import Process
from sublet.testing._system import InMemorySystem

AT_ONCE = EvictionPolicy(ttl=timedelta(0))

Mishap = Callable[["EnvironmentWorker"], None]
"""Happens in place of a task's code; raises what the task is to fail with."""


def task_of(task: Task[Any, Any] | Standalone[Any, Any]) -> Task[Any, Any]:
    return task.task if isinstance(task, Standalone) else task


class Mishaps:
    """What is to go wrong, first things first."""

    def __init__(self) -> None:
        self._planned: dict[tuple[str, str], deque[Mishap]] = defaultdict(deque)

    def plan(self, task: Task[Any, Any] | Standalone[Any, Any], mishap: Mishap) -> None:
        self._planned[_key(task_of(task))].append(mishap)

    def befall(self, task: Task[Any, Any], worker: EnvironmentWorker) -> None:
        """Called when the task's code is to begin."""
        planned = self._planned[_key(task)]
        if planned:
            planned.popleft()(worker)


def _key(task: Task[Any, Any]) -> tuple[str, str]:
    return task.workflow_name, task.name


class EnvironmentWorker:
    """Made by ``env.start_worker()``."""

    def __init__(
        self,
        world: InMemorySystem,
        mishaps: Mishaps,
        config: ClientConfig,
        name: str,
        workflows: Sequence[BaseWorkflow[Any]],
        *,
        slots: int | None,
        durable_slots: int | None,
        lifespan: LifespanFn | None,
        always_evict: bool,
    ) -> None:
        self._world = world
        self._process = Process(name)
        self._transport = world.transport(self._process)
        self._worker = _Prepared(
            name,
            config,
            slots=slots,
            durable_slots=durable_slots,
            workflows=workflows,
            lifespan=lifespan,
            transport=self._transport,
            now=world.clock.now,
            new_id=world.new_id,
        )
        self._worker.prepare = lambda task: _prepared(task, always_evict, lambda: mishaps.befall(task, self))

    @property
    def id(self) -> str:
        return self._worker.id

    @property
    def is_alive(self) -> bool:
        return not self._process.gone

    async def start(self) -> None:
        self._world.live_workers.add(self.id)
        await self._world.driver.run(self._in_process(self._worker.aio_start))

    async def stop(self) -> None:
        """In good order, as upon SIGTERM: it lets waiting tasks go, finishes what runs, and leaves."""
        if self.is_alive:
            await self._world.driver.run(self._in_process(self._worker.stop))
            self.die()

    async def kill(self) -> None:
        """As ``kill -9``: its code takes no further step, and nobody is told."""
        self.die()

    def die(self) -> None:
        if self.is_alive:
            self._world.live_workers.discard(self.id)
            self._world.loop.kill(self._process)
            self._transport.vanish()

    async def _in_process(self, step: Callable[[], Any]) -> None:
        with self._world.loop.acting_as(self._process):
            task = asyncio.get_running_loop().create_task(step())
        await task

    async def clean_up(self) -> None:
        """The test is over: free what its code holds."""
        self._process.gone = False
        await self._in_process(self._worker.abandon)


class _Prepared(Worker):
    """``prepare`` makes of each task the one that is run."""

    prepare: Callable[[Task[Any, Any]], Task[Any, Any]]

    def _registration(self) -> Registration:
        registration = super()._registration()
        tasks = {name: self.prepare(task) for name, task in registration.tasks.items()}
        return Registration(
            worker_id=registration.worker_id,
            name=registration.name,
            pool=registration.pool,
            slots=registration.slots,
            durable_slots=registration.durable_slots,
            tasks=tasks,
            specs=registration.specs,
            labels=registration.labels,
        )

    async def abandon(self) -> None:
        """Leave without finishing anything."""
        await self._resources.aclose()


def _prepared(task: Task[Any, Any], always_evict: bool, befall: Callable[[], None]) -> Task[Any, Any]:
    prepared = copy.copy(task)
    fn = task.fn
    if task.is_async_function:

        async def run(given: Any, ctx: Any) -> Any:
            befall()
            await asyncio.sleep(0)  # a worker that has just died stops here
            return await fn(given, ctx)

        prepared.fn = run
    else:

        def run_sync(given: Any, ctx: Any) -> Any:
            befall()
            return fn(given, ctx)

        prepared.fn = run_sync
    if always_evict and task.is_durable:
        prepared.eviction_policy = AT_ONCE
    return prepared
