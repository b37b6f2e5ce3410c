"""`SubletTestEnvironment`: where a test runs workflows without any server, and without waiting."""

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
from sublet.testing._workers import EnvironmentWorker, Mishaps

STARTS_AT = datetime(2030, 1, 1, tzinfo=UTC)

SKIP_OVER_S = 0.001
"""A skip ends this much late, so that what is due at its very end has happened."""

GOODBYE_S = 10.0
"""What is left at the end has this long (of the world's time) to clean up."""


class SubletTestEnvironment:
    """Everything that ``client`` does inside of the ``async with`` block happens in memory, on a clock of its own.

    That clock stands still while the test does something else. It runs, as fast as the machine can, while the test
    waits: for a result, for a skip, for a worker that stops. So nothing is really waited for, and every run of the
    test is like the other. Code of tasks runs in the test's thread, and sees this time in ``asyncio.sleep``, too; that
    of sync tasks runs in threads, and time waits for it.

    Args:
        client: yours, with which the workflows were declared; connected or not, it is as it was afterwards.
        workflows: what the first worker runs; none: start workers yourself.
        slots, durable_slots, lifespan: of the first worker, as in ``client.worker``.
        always_evict: durable tasks leave their worker at every wait, whatever their policy, and so are replayed from
            their log after each: code that does not do the same again fails with `NonDeterminismError`.
        starts_at: what time it is in there; always the same unless given.
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
        """All that were started, those that died included."""
        self._workflows = tuple(workflows)
        self._first_worker: dict[str, Any] = {"slots": slots, "durable_slots": durable_slots, "lifespan": lifespan}
        self._always_evict = always_evict
        self._starts_at = starts_at.timestamp()
        self._mishaps = Mishaps()
        self._redirections = ExitStack()
        self._world: InMemorySystem

    async def __aenter__(self) -> SubletTestEnvironment:
        self._world = InMemorySystem(self._starts_at)
        self._redirections.enter_context(self._world.redirecting(self.client._connection))
        try:
            await self._world.driver.run(self._world.start())
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
        """The time in there (UTC)."""
        return datetime.fromtimestamp(self._world.clock.now(), UTC)

    async def skip(
        self,
        delta: timedelta = timedelta(0),
        *,
        days: float = 0,
        hours: float = 0,
        minutes: float = 0,
        seconds: float = 0,
    ) -> None:
        """Let time pass. Whatever comes due happens, in order."""
        delta += timedelta(days=days, hours=hours, minutes=minutes, seconds=seconds)
        if delta < timedelta(0):
            raise ValueError("time cannot be skipped backwards")
        await self._world.driver.run(self._skip(delta.total_seconds()))

    async def _skip(self, by_s: float) -> None:
        end = self._world.loop.time() + by_s
        self._world.skips.append(end)
        try:
            await asyncio.sleep(by_s)
            await asyncio.sleep(SKIP_OVER_S)
        finally:
            self._world.skips.remove(end)

    # --- events -------------------------------------------------------------------------------------------------

    async def push(
        self,
        event_key: str,
        payload: JSON,
        additional_metadata: JSON | None = None,
        priority: int | Priority | None = None,
        scope: str | None = None,
    ) -> Event:
        """Publish an event, as ``client.event.aio_push``. When it returns, whoever waited for it knows."""
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
        """Start one more worker, of the environment's workflows unless others are given. Those of the same name share
        their work. See `EnvironmentWorker` for what can happen to it.

        Raises:
            ValueError: a workflow was declared with another client.
        """
        runs = self._workflows if workflows is None else tuple(workflows)
        for workflow in runs:
            if workflow._connection is not self.client._connection:
                raise ValueError(f"{workflow!r} was declared with another client than this environment's")
        worker = EnvironmentWorker(
            self._world,
            self._mishaps,
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

    # --- what goes wrong ----------------------------------------------------------------------------------------

    def fail_next(self, task: Task[Any, Any] | Standalone[Any, Any], error: BaseException, times: int = 1) -> None:
        """The next ``times`` that the task's code would begin (for a durable task also: go on after a wait), it raises
        this instead."""

        def fail(_: EnvironmentWorker) -> None:
            raise error

        for _ in range(times):
            self._mishaps.plan(task, fail)

    def kill_at_next(self, task: Task[Any, Any] | Standalone[Any, Any]) -> None:
        """The worker that next begins this task dies at that moment, as by ``kill -9``."""
        self._mishaps.plan(task, lambda worker: worker.die())

    # --- logs ---------------------------------------------------------------------------------------------------

    async def log(
        self, ref: TaskRunRef[Any, Any] | WorkflowRunRef | str, task: Task[Any, Any] | str | None = None
    ) -> dict[str, Any]:
        """The durable log of a run's task, as it would be exported from production; `replay` takes it.

        ``task`` is needed if the run has several. Raises RunNotFoundError, ValueError.
        """
        return await aio_export_log(self.client, ref, task)

    # --- the end ------------------------------------------------------------------------------------------------

    async def _close(self) -> None:
        self._world.driver.close()
        loop = self._world.loop
        with_code = [loop.create_task(worker.clean_up()) for worker in self.workers]
        loop.turn()
        for task in asyncio.all_tasks(loop).difference(with_code):
            task.cancel()
        until = loop.time() + GOODBYE_S
        loop.turn()
        while (left := asyncio.all_tasks(loop)) and loop.timers and loop.timers[0].when() <= until:
            loop.jump_to(loop.timers[0].when())
            loop.turn()
        for task in left:
            task._log_destroy_pending = False  # type: ignore[attr-defined]
        loop.close()
        self._redirections.close()
