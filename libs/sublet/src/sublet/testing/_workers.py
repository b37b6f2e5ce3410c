"""Workers of a test environment: they can be killed, and their tasks fail on demand."""

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

Fault = Callable[["EnvironmentWorker"], None]
"""Called before the code of a task. It may raise the exception with which the task fails."""


def task_of(task: Task[Any, Any] | Standalone[Any, Any]) -> Task[Any, Any]:
    return task.task if isinstance(task, Standalone) else task


class PlannedFaults:
    """Faults that will happen, by task, in the order in which they were planned."""

    def __init__(self) -> None:
        self._planned: dict[tuple[str, str], deque[Fault]] = defaultdict(deque)

    def plan(self, task: Task[Any, Any] | Standalone[Any, Any], fault: Fault) -> None:
        self._planned[_key(task_of(task))].append(fault)

    def inject(self, task: Task[Any, Any], worker: EnvironmentWorker) -> None:
        """Called before the code of a task starts."""
        planned = self._planned[_key(task)]
        if planned:
            planned.popleft()(worker)


def _key(task: Task[Any, Any]) -> tuple[str, str]:
    return task.workflow_name, task.name


class EnvironmentWorker:
    """A worker of a test environment, made by ``env.start_worker()``."""

    def __init__(
        self,
        system: InMemorySystem,
        faults: PlannedFaults,
        config: ClientConfig,
        name: str,
        workflows: Sequence[BaseWorkflow[Any]],
        *,
        slots: int | None,
        durable_slots: int | None,
        lifespan: LifespanFn | None,
        always_evict: bool,
    ) -> None:
        self._system = system
        self._process = Process(name)
        self._transport = system.transport(self._process)
        self._worker = _Prepared(
            name,
            config,
            slots=slots,
            durable_slots=durable_slots,
            workflows=workflows,
            lifespan=lifespan,
            transport=self._transport,
            now=system.clock.now,
            new_id=system.new_id,
        )
        self._worker.prepare = lambda task: _prepared(task, always_evict, lambda: faults.inject(task, self))

    @property
    def id(self) -> str:
        """The id of the worker."""
        return self._worker.id

    @property
    def is_alive(self) -> bool:
        """False after `stop` and `kill`."""
        return not self._process.gone

    async def start(self) -> None:
        """Start the worker. Called by ``env.start_worker()``."""
        self._system.live_workers.add(self.id)
        await self._system.driver.run(self._in_process(self._worker.aio_start))

    async def stop(self) -> None:
        """Shut down gracefully, as on SIGTERM: evict waiting tasks, finish running ones, and deregister."""
        if self.is_alive:
            await self._system.driver.run(self._in_process(self._worker.stop))
            self.die()

    async def kill(self) -> None:
        """Kill the worker, as by ``kill -9``: its code stops, and the schedulers get no message."""
        self.die()

    def die(self) -> None:
        """Kill the worker at once; the sync form of `kill`."""
        if self.is_alive:
            self._system.live_workers.discard(self.id)
            self._system.loop.kill(self._process)
            self._transport.vanish()

    async def _in_process(self, step: Callable[[], Any]) -> None:
        with self._system.loop.acting_as(self._process):
            task = asyncio.get_running_loop().create_task(step())
        await task

    async def clean_up(self) -> None:
        """Free the resources of the worker at the end of the environment."""
        self._process.gone = False
        await self._in_process(self._worker.abandon)


class _Prepared(Worker):
    """A worker that runs ``prepare(task)`` in place of each task."""

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
        """Stop without finishing running tasks."""
        await self._resources.aclose()


def _prepared(task: Task[Any, Any], always_evict: bool, inject: Callable[[], None]) -> Task[Any, Any]:
    prepared = copy.copy(task)
    fn = task.fn
    if task.is_async_function:

        async def run(given: Any, ctx: Any) -> Any:
            inject()
            await asyncio.sleep(0)  # the code of a worker that was just killed stops here
            return await fn(given, ctx)

        prepared.fn = run
    else:

        def run_sync(given: Any, ctx: Any) -> Any:
            inject()
            return fn(given, ctx)

        prepared.fn = run_sync
    if always_evict and task.is_durable:
        prepared.eviction_policy = AT_ONCE
    return prepared
