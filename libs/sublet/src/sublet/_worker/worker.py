"""A worker: runs the tasks of its workflows, as many at once as it has slots."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import signal
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from enum import StrEnum
from typing import Any

from sublet._amqp.adapter import AmqpTransport
from sublet._amqp.transport import Transport
from sublet._client.config import ClientConfig
from sublet._declare.base import BaseWorkflow
from sublet._declare.serialization import check_name
from sublet._declare.task import Task
from sublet._errors import LifespanSetupError, LoopAlreadyRunningError
from sublet._worker.runner import Registration, Runner, actions_of
from sublet_protocol import limits

LifespanFn = Callable[[], AsyncGenerator[Any, None]]
"""Everything before its ``yield`` happens before the first task, everything after it when the last one has ended. What
it yields is ``ctx.lifespan``: the place for connection pools."""


class WorkerStatus(StrEnum):
    INITIALIZED = "INITIALIZED"
    STARTING = "STARTING"
    HEALTHY = "HEALTHY"
    UNHEALTHY = "UNHEALTHY"
    """Not connected: what runs goes on, nothing new comes."""
    STOPPING = "STOPPING"
    STOPPED = "STOPPED"


class Worker:
    """Made by ``client.worker(name, …)``; ``start()`` blocks until a signal stops it.

    Workers with the same name and the same tasks share the work. The first SIGTERM or SIGINT makes it leave in good
    order: it takes nothing new, lets waiting durable tasks go, and finishes what runs. A second one ends the process at
    once; what ran is then run again by another worker.

    Args:
        name: of the worker and of its pool; the namespace of the configuration is put before it.
        slots: ordinary tasks at once, 100 unless given; only if a workflow has some.
        durable_slots: durable tasks at once that do not wait, 1,000 unless given; only if a workflow has some.
        labels: shown with the worker, and in ``ctx.worker_labels``.
        workflows: what it can run.
        lifespan: see `LifespanFn`.
        transport: instead of RabbitMQ at the configured address; for tests.

    Raises:
        TypeError: something else than a workflow or standalone task in ``workflows``.
        ValueError: slots that are not positive, or given for a kind that no task has; a workflow without tasks.
    """

    def __init__(
        self,
        name: str,
        config: ClientConfig,
        slots: int | None = None,
        durable_slots: int | None = None,
        labels: Mapping[str, str | int] | None = None,
        workflows: Sequence[BaseWorkflow[Any]] | None = None,
        lifespan: LifespanFn | None = None,
        transport: Transport | None = None,
        now: Callable[[], float] = time.time,
        new_id: Callable[[], str] = lambda: str(uuid.uuid4()),
    ) -> None:
        self.name = check_name(config.apply_namespace(name), "the name of a worker")
        self.id = new_id()
        self.labels = dict(labels or {})
        self._config = config
        self._slots = _checked_slots("slots", slots)
        self._durable_slots = _checked_slots("durable_slots", durable_slots)
        self._workflows: dict[str, BaseWorkflow[Any]] = {}
        self._lifespan = lifespan
        self._transport = transport
        self._now = now
        self._runner: Runner | None = None
        self._resources = contextlib.AsyncExitStack()
        self._status = WorkerStatus.INITIALIZED
        self.register_workflows(workflows or ())

    # --- what it can run ------------------------------------------------------------------------------------------

    def register_workflow(self, workflow: BaseWorkflow[Any]) -> None:
        """Add a workflow or standalone task; before the start."""
        if isinstance(workflow, Task):
            raise TypeError(
                f"{workflow!r} is one task of a workflow: register the workflow {workflow.workflow_name!r} itself"
            )
        if not isinstance(workflow, BaseWorkflow):
            raise TypeError(f"workflows=[…] takes workflows and standalone tasks, not {workflow!r}")
        if self._status is not WorkerStatus.INITIALIZED:
            raise RuntimeError(f"worker {self.name!r} has been started: register workflows before")
        if self._workflows.get(workflow.name, workflow) is not workflow:
            raise ValueError(f"two workflows have the name {workflow.name!r}")
        workflow.spec()
        self._workflows[workflow.name] = workflow

    def register_workflows(self, workflows: Sequence[BaseWorkflow[Any]]) -> None:
        for workflow in workflows:
            self.register_workflow(workflow)

    @property
    def slots(self) -> int:
        """Room for ordinary tasks."""
        return self._room(False, self._slots, limits.DEFAULT_SLOTS, "slots")

    @property
    def durable_slots(self) -> int:
        """Room for durable tasks."""
        return self._room(True, self._durable_slots, limits.DEFAULT_DURABLE_SLOTS, "durable_slots")

    @property
    def pool(self) -> str:
        """Workers of equal pool share their ready queues: same name, same tasks."""
        digest = hashlib.sha256("\n".join(actions_of(self._tasks)).encode()).hexdigest()[:8]
        return f"{self.name}-{digest}"

    @property
    def status(self) -> WorkerStatus:
        lost = self._status is WorkerStatus.HEALTHY and self._transport is not None and not self._transport.connected
        return WorkerStatus.UNHEALTHY if lost else self._status

    @property
    def held(self) -> Counter[str]:
        """How many tasks it holds at this moment: ``running``, ``waiting`` (durable tasks that stay for a while) and
        ``released`` (those that run on without a slot)."""
        return self._runner.held if self._runner is not None else Counter()

    # --- life -----------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Run until a signal comes.

        Raises:
            LoopAlreadyRunningError: there is an event loop in this thread; ``await worker.aio_start()`` there.
            LifespanSetupError: the lifespan function failed before its ``yield``.
        """
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            asyncio.run(self._serve())
        else:
            raise LoopAlreadyRunningError("worker.start() blocks: in async code use worker.aio_start() and stop()")

    async def aio_start(self) -> None:
        """Start, and return when it takes work. ``stop`` ends it."""
        if self._status is not WorkerStatus.INITIALIZED:
            raise RuntimeError(f"worker {self.name!r} has been started before; make another one")
        if not self._workflows:
            raise ValueError(f"worker {self.name!r} has nothing to run: give it workflows=[…]")
        registration = self._registration()
        self._status = WorkerStatus.STARTING
        try:
            await self._start(registration)
        except BaseException:
            self._status = WorkerStatus.STOPPED
            await self._resources.aclose()
            raise
        self._status = WorkerStatus.HEALTHY

    async def stop(self) -> None:
        """Leave in good order: see the class. Returns when all is done."""
        if self._runner is None or self._status is not WorkerStatus.HEALTHY:
            return
        self._status = WorkerStatus.STOPPING
        self._config.logger.info("worker %s finishes %d tasks and leaves", self.name, self.held.total())
        try:
            await self._runner.drain()
        finally:
            self._status = WorkerStatus.STOPPED
            await self._resources.aclose()

    async def _start(self, registration: Registration) -> None:
        lifespan = await self._enter_lifespan()
        if self._transport is None:
            self._transport = AmqpTransport(
                self._config.amqp_url,
                publish_timeout_s=self._config.publish_timeout_s,
                name=f"sublet-worker {self.name} {self.id}",
            )
        self._resources.push_async_callback(self._transport.close)
        await self._transport.connect()
        self._runner = Runner(registration, self._transport, self._config, lifespan, self._now)
        self._resources.callback(self._runner.close)
        await self._runner.start()
        self._config.logger.info(
            "worker %s takes work from pool %s: %d slots, %d durable slots",
            self.name,
            registration.pool,
            registration.slots,
            registration.durable_slots,
        )

    async def _serve(self) -> None:
        stopping = asyncio.Event()
        with _signals(stopping):
            starting = asyncio.ensure_future(self.aio_start())
            stopped_early = asyncio.ensure_future(stopping.wait())
            await asyncio.wait([starting, stopped_early], return_when=asyncio.FIRST_COMPLETED)
            if not starting.done():
                starting.cancel()
                await asyncio.gather(starting, return_exceptions=True)
                return
            await starting
            await stopped_early
            await self.stop()

    async def _enter_lifespan(self) -> Any:
        if self._lifespan is None:
            return None
        manager = contextlib.asynccontextmanager(self._lifespan)()
        try:
            return await self._resources.enter_async_context(manager)
        except Exception as error:
            raise LifespanSetupError(f"the lifespan of worker {self.name!r} failed: {error}") from error

    def _registration(self) -> Registration:
        return Registration(
            worker_id=self.id,
            name=self.name,
            pool=self.pool,
            slots=self.slots,
            durable_slots=self.durable_slots,
            tasks={(task.workflow_name, task.name): task for task in self._tasks},
            specs=tuple(workflow.spec() for workflow in self._workflows.values()),
            labels=self.labels,
        )

    @property
    def _tasks(self) -> list[Task[Any, Any]]:
        return [task for workflow in self._workflows.values() for task in workflow.tasks]

    def _room(self, durable: bool, given: int | None, default: int, what: str) -> int:
        needed = any(task.is_durable is durable for task in self._tasks)
        if not needed:
            if given is not None and self._workflows:
                kind = "durable" if durable else "ordinary"
                raise ValueError(f"worker {self.name!r} has {what}={given}, but no {kind} task to run in them")
            return 0
        return default if given is None else given


def _checked_slots(what: str, slots: int | None) -> int | None:
    if slots is not None and (not isinstance(slots, int) or isinstance(slots, bool) or not 1 <= slots <= 65_535):
        raise ValueError(f"{what} must be a whole number from 1 to 65,535, not {slots!r}")
    return slots


@contextlib.contextmanager
def _signals(stopping: asyncio.Event) -> Any:
    """The first signal sets the event, the second ends the process."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    loop = asyncio.get_running_loop()

    def on_signal() -> None:
        if stopping.is_set():
            print("second signal: leaving at once", file=sys.stderr)
            os._exit(1)
        stopping.set()

    for each in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(each, on_signal)
    try:
        yield
    finally:
        for each in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(each)
