"""`Worker`: runs the tasks of its workflows, as many at the same time as it has slots."""

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
from sublet._amqp.transport import PREFETCH_MAX, Transport
from sublet._client.config import ClientConfig
from sublet._declare.base import BaseWorkflow
from sublet._declare.serialization import check_name
from sublet._declare.task import Task
from sublet._errors import LifespanSetupError, LoopAlreadyRunningError
from sublet._worker.runner import Registration, Runner, actions_of
from sublet_protocol import limits

LifespanFn = Callable[[], AsyncGenerator[Any, None]]
"""An async generator function with one ``yield``, for example to open and close a connection pool.

The code before the ``yield`` runs before the first task, the code after it runs after the last task. The yielded value
is ``ctx.lifespan``."""


POOL_DIGEST_DIGITS = 8
"""Hexadecimal digits in the name of a pool: enough to tell the few sets of tasks under one worker name apart."""

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class WorkerStatus(StrEnum):
    """Status of a worker, see ``worker.status``."""

    INITIALIZED = "INITIALIZED"
    STARTING = "STARTING"
    HEALTHY = "HEALTHY"
    UNHEALTHY = "UNHEALTHY"
    """Not connected to RabbitMQ. Running tasks continue, and no new ones start."""
    STOPPING = "STOPPING"
    STOPPED = "STOPPED"


class Worker:
    """A worker, made by ``client.worker(name, …)``. ``start()`` blocks until a signal stops it.

    Workers with the same name and the same tasks share their work. On the first SIGTERM or SIGINT a worker shuts down
    gracefully: it takes no new tasks, evicts waiting durable tasks, finishes running tasks and deregisters. A second
    signal ends the process at once. Its tasks are then run again by other workers.

    Args:
        name: the name of the worker and of its pool. The namespace of the client is its prefix.
        config: the settings of the client.
        slots: how many ordinary tasks run at the same time. None: 100.
        durable_slots: how many durable tasks it holds at the same time; evicted ones do not count. None: 1,000.
        labels: shown with the worker, and in ``ctx.worker_labels``.
        workflows: the workflows and standalone tasks that it runs.
        lifespan: see `LifespanFn`.
        transport: for tests: used instead of the connection to RabbitMQ.
        now: for tests: the time in Unix seconds.
        new_id: for tests: makes the id of the worker.

    Raises:
        TypeError: an entry of ``workflows`` is not a workflow or a standalone task.
        ValueError: a number of slots is out of range; a workflow has no tasks; two workflows have the same name.
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

    # --- what it can run -------------------------------------------------------------------------------------------

    def register_workflow(self, workflow: BaseWorkflow[Any]) -> None:
        """Add a workflow or a standalone task, before the worker is started.

        Raises:
            TypeError: it is not a workflow or a standalone task.
            ValueError: it has no tasks, or another workflow has the same name.
            RuntimeError: the worker has been started.
        """
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
        """Add several workflows, see `register_workflow`."""
        for workflow in workflows:
            self.register_workflow(workflow)

    @property
    def slots(self) -> int:
        """How many ordinary tasks run at the same time; 0 if no workflow has any."""
        return self._slots_of_kind(False, self._slots, limits.DEFAULT_SLOTS, "slots")

    @property
    def durable_slots(self) -> int:
        """How many durable tasks are held at the same time; 0 if no workflow has any."""
        return self._slots_of_kind(True, self._durable_slots, limits.DEFAULT_DURABLE_SLOTS, "durable_slots")

    @property
    def pool(self) -> str:
        """Name of the pool: the name of the worker and a digest of its tasks. Workers of one pool share their work."""
        digest = hashlib.sha256("\n".join(actions_of(self._tasks)).encode()).hexdigest()[:POOL_DIGEST_DIGITS]
        return f"{self.name}-{digest}"

    @property
    def status(self) -> WorkerStatus:
        lost = self._status is WorkerStatus.HEALTHY and self._transport is not None and not self._transport.connected
        return WorkerStatus.UNHEALTHY if lost else self._status

    @property
    def held(self) -> Counter[str]:
        """Number of tasks that the worker holds now, by state.

        ``running``; ``waiting``: durable tasks that wait and are not evicted; ``released``: tasks that released their
        slot and still run.
        """
        return self._runner.held if self._runner is not None else Counter()

    # --- start and stop --------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Run until the process gets SIGTERM or SIGINT. Blocks this thread.

        Raises:
            LoopAlreadyRunningError: this thread has a running event loop: use ``await worker.aio_start()``.
            LifespanSetupError: the lifespan function failed before its ``yield``.
            TransportUnavailable: RabbitMQ refuses the user or password.
            ValueError: the worker has no workflows, or slots are given for a kind of task that it does not have.
        """
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            asyncio.run(self._serve())
        else:
            raise LoopAlreadyRunningError("worker.start() blocks: in async code use worker.aio_start() and stop()")

    async def aio_start(self) -> None:
        """Start, and return when the worker takes tasks. `stop` ends it.

        Raises:
            The same exceptions as `start`, and RuntimeError if the worker has been started before.
        """
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
        """Shut down gracefully, see the class. Returns when all running tasks have ended."""
        if self._runner is None or self._status is not WorkerStatus.HEALTHY:
            return
        self._status = WorkerStatus.STOPPING
        self._config.logger.info("worker %s is shutting down: finishing %d tasks", self.name, self.held.total())
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
            "worker %s is ready: pool %s, %d slots, %d durable slots",
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

    def _slots_of_kind(self, durable: bool, given: int | None, default: int, what: str) -> int:
        needed = any(task.is_durable is durable for task in self._tasks)
        if not needed:
            if given is not None and self._workflows:
                kind = "durable" if durable else "ordinary"
                raise ValueError(f"worker {self.name!r} has {what}={given}, but no {kind} task to run in them")
            return 0
        return default if given is None else given


def _checked_slots(what: str, slots: int | None) -> int | None:
    if slots is not None and (not isinstance(slots, int) or isinstance(slots, bool) or not 1 <= slots <= PREFETCH_MAX):
        raise ValueError(f"{what} must be a whole number from 1 to {PREFETCH_MAX:,}, not {slots!r}")
    return slots


@contextlib.contextmanager
def _signals(stopping: asyncio.Event) -> Any:
    """On the first signal set ``stopping``, on the second end the process.

    Outside the main thread Python does not allow signal handlers, so nothing is installed there.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    loop = asyncio.get_running_loop()

    def on_signal() -> None:
        if stopping.is_set():
            print("second signal: exiting at once", file=sys.stderr)
            os._exit(1)
        stopping.set()

    for number in STOP_SIGNALS:
        loop.add_signal_handler(number, on_signal)
    try:
        yield
    finally:
        for number in STOP_SIGNALS:
            loop.remove_signal_handler(number)
