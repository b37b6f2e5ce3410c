"""`Sublet`: where everything begins."""

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

    It connects when it first has to, so it can be made at import time. The sync methods work in threads with a running
    event loop and in those without; the ``aio_…`` methods on whatever loop awaits them.
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
            config: read from the environment unless given.
            transport_factory, background, now, new_id: for tests and simulations: another way to the broker; False to
                run on the caller's event loop (only ``aio_…`` methods then); the time in epoch seconds; fresh ids.
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
        """The context of the task that this code runs in; None outside of tasks."""
        return current_context.get()

    def close(self) -> None:
        """Close the connection. Not needed at the end of a program."""
        self._connection.sync(self._connection.close())
        self._connection.stop()

    async def aio_close(self) -> None:
        """As `close`."""
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
        """Declare a workflow; its decorators (``@workflow.task()``) add the tasks.

        Args:
            name: unique in the namespace.
            description: for people.
            input_validator: type of the input: a pydantic model, a dataclass, a TypedDict or ``dict``.
            on_events: keys of events that start a run with their payload as the input; ``*`` stands for any characters.
            version: for people; what Sublet goes by is a digest of the declaration.
            default_priority: of runs that do not say.
            default_filters: with any, an event starts one run for each filter of its scope whose expression is true.
            default_additional_metadata: of every run.
            task_defaults: for parameters that a task leaves at their defaults.

        Raises:
            ValueError: the name or an event key is not valid.
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
        """Declare a task on its own, with a function ``(input, ctx) -> output``, async or not.

        ``name`` is the function's name unless given. The arguments about the workflow are as in `workflow`, those about
        the task as in `Workflow.task`. The output is a pydantic model, a dictionary, a dataclass or None; callers get
        it as the type that the function is annotated with.

        Raises:
            ValueError, TypeError: as `workflow` and `Workflow.task`.
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
        """Declare a durable task on its own: an async function whose waits are kept in a log, so that it can leave its
        worker while it waits and go on elsewhere. ``execution_timeout`` counts active time only; ``eviction_policy``
        None keeps it on its worker. Otherwise as `task`."""

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
        """A worker of the pool ``name`` that runs these workflows once it is started.

        Args:
            name: workers of one name that register the same tasks share their work.
            slots: ordinary tasks at a time; 100 unless given.
            durable_slots: durable tasks at a time that are not waiting; 1,000 unless given.
            labels: for people.
            workflows: what it can run; more by ``worker.register_workflow``.
            lifespan: an async generator function: what it yields is ``ctx.lifespan`` of every task; it is resumed after
                the last task has ended.
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
