"""Calls the function of a task in a unit test, with a context that needs no connection."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextvars import copy_context
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, TypeVar, cast

import msgspec

from sublet._client.config import ClientConfig
from sublet._declare.serialization import encode_object
from sublet._declare.types import JSON, EmptyModel
from sublet._durable.context import DurableContext
from sublet._worker.context import ChildSpawn, Context, current_context
from sublet_protocol import ids, limits
from sublet_protocol.messages import Completion, Grant
from sublet_protocol.specs import Groups

if TYPE_CHECKING:
    from sublet._declare.task import Task

T = TypeVar("T")


class MockTaskServices:
    """`TaskServices` that do nothing and return at once."""

    worker_id = "mock-worker"
    worker_labels: Mapping[str, str | int] = {}

    def __init__(self, task: Task[Any, Any], lifespan: Any = None) -> None:
        self.config: ClientConfig = task._config
        self.lifespan = lifespan
        self.is_cancelled = False

    def now(self) -> float:
        return time.time()

    def release_slot(self) -> asyncio.Future[None]:
        return _done()

    def extend(self, by_s: float) -> asyncio.Future[None]:
        return _done()

    def cancel(self) -> asyncio.Future[None]:
        self.is_cancelled = True
        return _done()

    def from_sync(self, start: Callable[[], asyncio.Future[None]]) -> None:
        start()


def _done() -> asyncio.Future[None]:
    try:
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    except RuntimeError:  # called by sync code, which does not await it
        return cast("asyncio.Future[None]", None)
    future.set_result(None)
    return future


class MockDurableContext(DurableContext):
    """Context of a durable task without a log, so the task cannot wait."""

    def __init__(self, grant: Grant, task: Task[Any, Any], services: MockTaskServices) -> None:
        super().__init__(grant, task, services, invocation=cast("Any", None))

    async def _wait(self, groups: Groups, label: str | None) -> Completion:
        raise ValueError("a mocked durable task cannot wait: test it in a SubletTestEnvironment (sublet.testing)")

    async def _aio_spawn(self, spawns: Sequence[ChildSpawn], wait: bool) -> list[Any]:
        raise ValueError("a mocked durable task has no children: test it in a SubletTestEnvironment (sublet.testing)")

    async def aio_now(self) -> datetime:
        return datetime.fromtimestamp(self._services.now(), UTC)

    async def aio_memo(
        self, fn: Callable[..., T | Awaitable[T]], result_validator: type[T], /, *args: Any, **kwargs: Any
    ) -> T:
        value = fn(*args, **kwargs)
        return await value if isinstance(value, Awaitable) else value

    _aio_memo = aio_memo


def mock_run(
    task: Task[Any, Any],
    given: Any,
    additional_metadata: JSON | None,
    parent_outputs: Mapping[str, JSON] | None,
    retry_count: int,
    lifespan: Any,
    dependencies: Mapping[str, Any] | None,
) -> Any:
    """Raises TypeError for an async function. See `Task.mock_run`."""
    if task.is_async_function:
        raise TypeError(f"task {task.name!r} is an async function: await its aio_mock_run(…)")
    context = _context(task, additional_metadata, parent_outputs, retry_count, lifespan)

    def call() -> Any:
        current_context.set(context)
        return task.fn(_checked(task, given), context, **(dependencies or {}))

    return copy_context().run(call)


async def aio_mock_run(
    task: Task[Any, Any],
    given: Any,
    additional_metadata: JSON | None,
    parent_outputs: Mapping[str, JSON] | None,
    retry_count: int,
    lifespan: Any,
    dependencies: Mapping[str, Any] | None,
) -> Any:
    """Raises TypeError for a sync function. See `Task.aio_mock_run`."""
    if not task.is_async_function:
        raise TypeError(f"task {task.name!r} is no async function: call its mock_run(…)")
    context = _context(task, additional_metadata, parent_outputs, retry_count, lifespan)
    before = current_context.set(context)
    try:
        return await task.fn(_checked(task, given), context, **(dependencies or {}))
    finally:
        current_context.reset(before)


def _checked(task: Task[Any, Any], given: Any) -> Any:
    return task._input_codec.check(EmptyModel() if given is None else given)


def _context(
    task: Task[Any, Any],
    additional_metadata: JSON | None,
    parent_outputs: Mapping[str, JSON] | None,
    retry_count: int,
    lifespan: Any,
) -> Context:
    metadata = encode_object(additional_metadata or {}, "additional_metadata", limits.METADATA_MAX_BYTES)
    grant = Grant(
        ticket="mock",
        lease=ids.lease_id(ids.task_run_id(f"mock-{uuid.uuid4()}", task.name), retry_count + 1),
        workflow=task.workflow_name,
        version="mock",
        task=task.name,
        input=msgspec.Raw(b"{}"),
        retry_count=retry_count,
        invocation=retry_count + 1,
        timeout_s=0.0,
        metadata=msgspec.json.decode(metadata),
        parents={
            name: msgspec.Raw(encode_object(output, f"the output of {name!r}", limits.PAYLOAD_MAX_BYTES))
            for name, output in (parent_outputs or {}).items()
        },
    )
    services = MockTaskServices(task, lifespan)
    return MockDurableContext(grant, task, services) if task.is_durable else Context(grant, task, services)
