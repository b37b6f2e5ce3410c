"""`SubletTestEnvironment`: runs workflows in a test, without servers and without real waiting."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from types import TracebackType
from typing import Any

from sublet._client.client import Sublet
from sublet._client.events import Event
from sublet._client.refs import TaskRunRef, WorkflowRunRef
from sublet._declare.base import BaseWorkflow
from sublet._declare.standalone import Standalone
from sublet._declare.task import Task
from sublet._declare.types import JSON, Priority
from sublet._worker.worker import LifespanFn
from sublet.testing._export import aio_export_log
from sublet.testing._system import InMemorySystem
from sublet.testing._workers import EnvironmentWorker, PlannedFaults

STARTS_AT = datetime(2030, 1, 1, tzinfo=UTC)

SKIP_MARGIN_S = 0.001
"""Seconds that a skip lasts longer, so that everything that is due at its end has happened."""

CLEAN_UP_S = 10.0
"""Seconds of virtual time that remaining tasks have for their clean-up at the end of the environment."""


class SubletTestEnvironment:
    """A complete Sublet in memory, with virtual time. Use it in ``async with``.

    Inside the block, everything that ``client`` does happens in memory. The virtual clock runs only while the test
    waits for something: a result, a skip, a worker that stops. It jumps from each due timer to the next, so nothing
    really waits, and each run of a test is the same. Async tasks run in the thread of the test and see the virtual
    time, also in ``asyncio.sleep``. Sync tasks run in threads; the virtual time does not advance while they run.

    Args:
        client: the client with which the workflows were declared. Its state is restored after the block.
        workflows: workflows of the first worker. Without any, start workers by `start_worker`.
        slots, durable_slots, lifespan: options of the first worker, see ``client.worker``.
        always_evict: True evicts durable tasks at every wait, whatever their policy, so each of them is replayed after
            each wait. Code that does not repeat its operations then fails with `NonDeterminismError`.
        starts_at: the virtual time at the start. The default is always the same.

    Attributes:
        client: the client.
        workers: all workers that were started, including those that were killed.
    """

    def __init__(
        self,
        client: Sublet,
        workflows: Sequence[BaseWorkflow[Any]] = (),
        *,
        slots: int | None = None,
        durable_slots: int | None = None,
        lifespan: LifespanFn | None = None,
        always_evict: bool = False,
        starts_at: datetime = STARTS_AT,
    ) -> None:
        self.client = client
        self.workers: list[EnvironmentWorker] = []
        self._workflows = tuple(workflows)
        self._first_worker: dict[str, Any] = {"slots": slots, "durable_slots": durable_slots, "lifespan": lifespan}
        self._always_evict = always_evict
        self._starts_at = starts_at.timestamp()
        self._faults = PlannedFaults()
        self._redirections = ExitStack()
        self._system: InMemorySystem

    async def __aenter__(self) -> SubletTestEnvironment:
        self._system = InMemorySystem(self._starts_at)
        self._redirections.enter_context(self._system.redirecting(self.client._connection))
        try:
            await self._system.driver.run(self._system.start())
            if self._workflows:
                await self.start_worker(**self._first_worker)
        except BaseException:
            await self._close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._close()

    # --- time ---------------------------------------------------------------------------------------------------

    @property
    def now(self) -> datetime:
        """The virtual time (UTC)."""
        return datetime.fromtimestamp(self._system.clock.now(), UTC)

    async def skip(
        self,
        delta: timedelta = timedelta(0),
        *,
        days: float = 0,
        hours: float = 0,
        minutes: float = 0,
        seconds: float = 0,
    ) -> None:
        """Advance the virtual time. Everything that becomes due happens, in order.

        Args:
            delta, days, hours, minutes, seconds: added up.

        Raises:
            ValueError: the sum is negative.
        """
        delta += timedelta(days=days, hours=hours, minutes=minutes, seconds=seconds)
        if delta < timedelta(0):
            raise ValueError("time cannot be skipped backwards")
        await self._system.driver.run(self._skip(delta.total_seconds()))

    async def _skip(self, by_s: float) -> None:
        end = self._system.loop.time() + by_s
        self._system.skips.append(end)
        try:
            await asyncio.sleep(by_s)
            await asyncio.sleep(SKIP_MARGIN_S)
        finally:
            self._system.skips.remove(end)

    # --- events -------------------------------------------------------------------------------------------------

    async def push(
        self,
        event_key: str,
        payload: JSON,
        additional_metadata: JSON | None = None,
        priority: int | Priority | None = None,
        scope: str | None = None,
    ) -> Event:
        """Publish an event, see ``client.event.aio_push``. When it returns, waiting tasks have received it."""
        return await self.client.event.aio_push(event_key, payload, additional_metadata, priority, scope)

    # --- workers ------------------------------------------------------------------------------------------------

    async def start_worker(
        self,
        name: str = "worker",
        *,
        workflows: Sequence[BaseWorkflow[Any]] | None = None,
        slots: int | None = None,
        durable_slots: int | None = None,
        lifespan: LifespanFn | None = None,
    ) -> EnvironmentWorker:
        """Start another worker. Workers with the same name and the same tasks share their work.

        Args:
            name: the name of the worker.
            workflows: None: the workflows of the environment.
            slots, durable_slots, lifespan: see ``client.worker``.

        Raises:
            ValueError: a workflow was declared with another client.
        """
        runs = self._workflows if workflows is None else tuple(workflows)
        for workflow in runs:
            if workflow._connection is not self.client._connection:
                raise ValueError(f"{workflow!r} was declared with another client than this environment's")
        worker = EnvironmentWorker(
            self._system,
            self._faults,
            self.client.config,
            name,
            runs,
            slots=slots,
            durable_slots=durable_slots,
            lifespan=lifespan,
            always_evict=self._always_evict,
        )
        self.workers.append(worker)
        await worker.start()
        return worker

    # --- faults ----------------------------------------------------------------------------------------

    def fail_next(self, task: Task[Any, Any] | Standalone[Any, Any], error: BaseException, times: int = 1) -> None:
        """Make the next ``times`` starts of the task raise ``error`` instead of running its code.

        A resume of a durable task after an eviction counts as a start.
        """

        def fail(_: EnvironmentWorker) -> None:
            raise error

        for _ in range(times):
            self._faults.plan(task, fail)

    def kill_at_next(self, task: Task[Any, Any] | Standalone[Any, Any]) -> None:
        """Kill the worker that next starts this task, at that moment, as by ``kill -9``."""
        self._faults.plan(task, lambda worker: worker.die())

    # --- logs ---------------------------------------------------------------------------------------------------

    async def log(
        self, ref: TaskRunRef[Any, Any] | WorkflowRunRef | str, task: Task[Any, Any] | str | None = None
    ) -> dict[str, Any]:
        """Export the durable log of a task, for `replay`. See `export_log` for arguments and exceptions."""
        return await aio_export_log(self.client, ref, task)

    # --- the end ------------------------------------------------------------------------------------------------

    async def _close(self) -> None:
        self._system.driver.close()
        loop = self._system.loop
        clean_ups = [loop.create_task(worker.clean_up()) for worker in self.workers]
        loop.turn()
        for task in asyncio.all_tasks(loop).difference(clean_ups):
            task.cancel()
        deadline = loop.time() + CLEAN_UP_S
        loop.turn()
        while (remaining := asyncio.all_tasks(loop)) and loop.timers and loop.timers[0].when() <= deadline:
            loop.jump_to(loop.timers[0].when())
            loop.turn()
        for task in remaining:
            task._log_destroy_pending = False  # type: ignore[attr-defined]
        loop.close()
        self._redirections.close()
