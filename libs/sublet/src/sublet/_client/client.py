"""`Sublet`: the client, which declares workflows, runs them and makes workers."""

from __future__ import annotations

import os
import socket
import time
import uuid
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Unpack, overload

from sublet._amqp.transport import Transport
from sublet._client.config import ClientConfig
from sublet._client.connection import Connection, TransportFactory
from sublet._client.events import EventClient
from sublet._client.runs import RunsClient
from sublet._client.stubs import StubsClient
from sublet._declare.base import BaseWorkflow, WorkflowConfig
from sublet._declare.durations import Duration
from sublet._declare.options import (
    DEFAULT_EXECUTION_TIMEOUT,
    DEFAULT_SCHEDULE_TIMEOUT,
    DurableStandaloneOptions,
    StandaloneOptions,
    TaskOptions,
    WorkflowOptions,
)
from sublet._declare.standalone import Standalone
from sublet._declare.task import function_name, return_type
from sublet._declare.types import (
    DEFAULT_DURABLE_TASK_EVICTION_POLICY,
    JSON,
    DefaultFilter,
    EmptyModel,
    EvictionPolicy,
    In,
    Priority,
    R,
    TaskDefaults,
)
from sublet._declare.workflow import Workflow
from sublet._worker.context import current_context

if TYPE_CHECKING:
    from sublet._durable.context import DurableContext
    from sublet._worker.context import Context
    from sublet._worker.worker import LifespanFn, Worker


def _amqp(config: ClientConfig) -> Transport:
    from sublet._amqp.adapter import AmqpTransport

    name = f"sublet client {socket.gethostname()}:{os.getpid()}"
    return AmqpTransport(config.amqp_url, publish_timeout_s=config.publish_timeout_s, name=name)


class Sublet:
    """A client: declares workflows, runs them, publishes events, and makes workers.

    The client connects at the first use, so it can be created at import time. The ``aio_…`` methods can be awaited on
    any event loop. The other methods block the calling thread; they can be called from any thread.

    Attributes:
        config: the settings of this client.
        event: publishes events, see `EventClient`.
        runs: reads, cancels and replays runs, see `RunsClient`.
        stubs: runs workflows whose code is in another program, see `StubsClient`.
    """

    def __init__(
        self,
        config: ClientConfig | None = None,
        *,
        transport_factory: TransportFactory | None = None,
        background: bool = True,
        now: Callable[[], float] = time.time,
        new_id: Callable[[], str] = lambda: str(uuid.uuid4()),
    ) -> None:
        """
        Args:
            config: the settings. None reads them from the environment and ``.env`` files.
            transport_factory: for tests: makes another connection than the one to RabbitMQ.
            background: for tests: False runs everything on the event loop of the caller, and only the ``aio_…``
                methods can be used.
            now: for tests: the time in Unix seconds.
            new_id: for tests: makes ids that are not used yet.
        """
        self.config = config or ClientConfig()
        self._transport_factory, self._now, self._new_id = transport_factory, now, new_id
        self._connection = Connection(
            self.config, transport_factory or _amqp, background=background, now=now, new_id=new_id
        )
        self.event = EventClient(self._connection, self.config)
        self.runs = RunsClient(self._connection, self.config.apply_namespace)
        self.stubs = StubsClient(self._connection, self.config)

    @property
    def namespace(self) -> str:
        return self.config.namespace

    @property
    def current_context(self) -> Context | None:
        """The context of the task that runs this code; None outside of tasks."""
        return current_context.get()

    def close(self) -> None:
        """Close the connection. Not needed at the end of a program. The next call connects again."""
        self._connection.sync(self._connection.close())
        self._connection.stop()

    async def aio_close(self) -> None:
        """Like `close`, for async code."""
        await self._connection.aio(self._connection.close())
        self._connection.stop()

    # --- workflows ------------------------------------------------------------------------------------------------

    @overload
    def workflow(
        self,
        *,
        name: str,
        input_validator: None = ...,
        **options: Unpack[WorkflowOptions],
    ) -> Workflow[EmptyModel]: ...

    @overload
    def workflow(
        self,
        *,
        name: str,
        input_validator: type[In],
        **options: Unpack[WorkflowOptions],
    ) -> Workflow[In]: ...

    def workflow(
        self,
        *,
        name: str,
        description: str | None = None,
        input_validator: type[Any] | None = None,
        on_events: list[str] | None = None,
        version: str | None = None,
        default_priority: int | Priority = Priority.LOW,
        default_filters: list[DefaultFilter] | None = None,
        default_additional_metadata: JSON | None = None,
        task_defaults: TaskDefaults = TaskDefaults(),  # noqa: B008  # never changed
    ) -> Workflow[Any]:
        """Declare a workflow. Its decorators (``@workflow.task()``) add the tasks.

        Args:
            name: unique in the namespace.
            description: a text for humans.
            input_validator: type of the input: a pydantic model, a dataclass, a TypedDict or ``dict``. None accepts
                any JSON object.
            on_events: keys of events. Each event with one of these keys starts a run, with its payload as the input.
                ``*`` stands for any characters.
            version: a label for humans. Sublet itself tells versions apart by a digest of the declaration.
            default_priority: priority of runs that are started without one.
            default_filters: if there are any, an event starts one run for each filter that has the scope of the event
                and an expression that is true.
            default_additional_metadata: metadata of every run.
            task_defaults: replaces the defaults of the options of the tasks.

        Raises:
            ValueError: the name or an event key is not valid, or the metadata are too large.
        """
        declared = _declared(
            description,
            input_validator,
            on_events,
            version,
            default_priority,
            default_filters,
            default_additional_metadata,
            name=name,
        )
        return Workflow(declared, self._connection, self.config, task_defaults)

    # --- standalone tasks -----------------------------------------------------------------------------------------

    @overload
    def task(
        self,
        *,
        input_validator: None = ...,
        **options: Unpack[StandaloneOptions],
    ) -> Callable[[Callable[[EmptyModel, Context], R | Awaitable[R]]], Standalone[EmptyModel, R]]: ...

    @overload
    def task(
        self,
        *,
        input_validator: type[In],
        **options: Unpack[StandaloneOptions],
    ) -> Callable[[Callable[[In, Context], R | Awaitable[R]]], Standalone[In, R]]: ...

    def task(
        self,
        *,
        name: str | None = None,
        description: str | None = None,
        input_validator: type[Any] | None = None,
        on_events: list[str] | None = None,
        version: str | None = None,
        default_priority: int | Priority = Priority.LOW,
        default_filters: list[DefaultFilter] | None = None,
        default_additional_metadata: JSON | None = None,
        schedule_timeout: Duration = DEFAULT_SCHEDULE_TIMEOUT,
        execution_timeout: Duration = DEFAULT_EXECUTION_TIMEOUT,
        retries: int = 0,
        backoff_factor: float | None = None,
        backoff_max_seconds: int | None = None,
    ) -> Callable[[Callable[[Any, Any], Any]], Standalone[Any, Any]]:
        """Declare a standalone task: a workflow of one task. The function is ``(input, ctx) -> output``, sync or async.

        The function returns a pydantic model, a dataclass, a dictionary or None. Callers get the type of its return
        annotation.

        Args:
            name: unique in the namespace. None: the name of the function.
            description, input_validator, on_events, version: see `workflow`.
            default_priority, default_filters, default_additional_metadata: see `workflow`.
            schedule_timeout, execution_timeout, retries, backoff_factor, backoff_max_seconds: see `Workflow.task`.

        Raises:
            ValueError: see `workflow` and `Workflow.task`.
            TypeError: the return annotation cannot be resolved.
        """

        declared = partial(
            _declared,
            description,
            input_validator,
            on_events,
            version,
            default_priority,
            default_filters,
            default_additional_metadata,
        )
        options = TaskOptions(
            name=name,
            schedule_timeout=schedule_timeout,
            execution_timeout=execution_timeout,
            retries=retries,
            backoff_factor=backoff_factor,
            backoff_max_seconds=backoff_max_seconds,
        )
        return self._decorator(declared, options)

    @overload
    def durable_task(
        self,
        *,
        input_validator: None = ...,
        **options: Unpack[DurableStandaloneOptions],
    ) -> Callable[[Callable[[EmptyModel, DurableContext], Awaitable[R]]], Standalone[EmptyModel, R]]: ...

    @overload
    def durable_task(
        self,
        *,
        input_validator: type[In],
        **options: Unpack[DurableStandaloneOptions],
    ) -> Callable[[Callable[[In, DurableContext], Awaitable[R]]], Standalone[In, R]]: ...

    def durable_task(
        self,
        *,
        name: str | None = None,
        description: str | None = None,
        input_validator: type[Any] | None = None,
        on_events: list[str] | None = None,
        version: str | None = None,
        default_priority: int | Priority = Priority.LOW,
        default_filters: list[DefaultFilter] | None = None,
        default_additional_metadata: JSON | None = None,
        schedule_timeout: Duration = DEFAULT_SCHEDULE_TIMEOUT,
        execution_timeout: Duration = DEFAULT_EXECUTION_TIMEOUT,
        retries: int = 0,
        backoff_factor: float | None = None,
        backoff_max_seconds: int | None = None,
        eviction_policy: EvictionPolicy | None = DEFAULT_DURABLE_TASK_EVICTION_POLICY,
    ) -> Callable[[Callable[[Any, Any], Awaitable[Any]]], Standalone[Any, Any]]:
        """Declare a standalone durable task: an async function whose operations are recorded in a durable log.

        While it waits it can be evicted from its worker, and any worker can resume it.

        Args:
            execution_timeout: counts active time only, not the time in which the task waits.
            eviction_policy: when the task leaves its worker while it waits. None: never.

        The other arguments and the exceptions are those of `task`.
        """

        declared = partial(
            _declared,
            description,
            input_validator,
            on_events,
            version,
            default_priority,
            default_filters,
            default_additional_metadata,
        )
        options = TaskOptions(
            is_durable=True,
            name=name,
            schedule_timeout=schedule_timeout,
            execution_timeout=execution_timeout,
            retries=retries,
            backoff_factor=backoff_factor,
            backoff_max_seconds=backoff_max_seconds,
            eviction_policy=eviction_policy,
        )
        return self._decorator(declared, options)

    # --- workers --------------------------------------------------------------------------------------------------

    def worker(
        self,
        name: str,
        slots: int | None = None,
        durable_slots: int | None = None,
        labels: dict[str, str | int] | None = None,
        workflows: list[BaseWorkflow[Any]] | None = None,
        lifespan: LifespanFn | None = None,
    ) -> Worker:
        """Make a worker that runs these workflows. Call its ``start()``.

        Args:
            name: workers with the same name and the same tasks share their work.
            slots: how many ordinary tasks run at the same time. None: 100.
            durable_slots: how many durable tasks it holds at the same time; evicted ones do not count. None: 1,000.
            labels: shown with the worker, and in ``ctx.worker_labels``.
            workflows: the workflows and standalone tasks that it runs. ``worker.register_workflow`` adds more.
            lifespan: an async generator function. The code before its ``yield`` runs before the first task, the code
                after it runs after the last task. The yielded value is ``ctx.lifespan``.

        Raises:
            TypeError: an entry of ``workflows`` is not a workflow or a standalone task.
            ValueError: a number of slots is out of range, a workflow has no tasks, or two have the same name.
        """
        from sublet._worker.worker import Worker

        return Worker(
            name=name,
            config=self.config,
            slots=slots,
            durable_slots=durable_slots,
            labels=labels,
            workflows=workflows,
            lifespan=lifespan,
            transport=self._transport_factory(self.config) if self._transport_factory else None,
            now=self._now,
            new_id=self._new_id,
        )

    def _decorator(
        self, declared: Callable[..., WorkflowConfig], options: TaskOptions
    ) -> Callable[[Callable[..., Any]], Standalone[Any, Any]]:
        def decorate(fn: Callable[..., Any]) -> Standalone[Any, Any]:
            config = declared(name=options.name or function_name(fn))
            output_type = return_type(fn, config.name)
            standalone: Standalone[Any, Any] = Standalone(config, self._connection, self.config, output_type)
            standalone.add(fn, **vars(options))
            return standalone

        return decorate


def _declared(
    description: str | None,
    input_validator: type[Any] | None,
    on_events: list[str] | None,
    version: str | None,
    default_priority: int | Priority,
    default_filters: list[DefaultFilter] | None,
    default_additional_metadata: JSON | None,
    *,
    name: str,
) -> WorkflowConfig:
    return WorkflowConfig(
        name=name,
        description=description,
        input_validator=input_validator or EmptyModel,
        on_events=on_events or (),
        version=version,
        default_priority=default_priority,
        default_filters=default_filters or (),
        default_additional_metadata=default_additional_metadata or {},
    )
