"""The context of a durable task: its methods are operations that are recorded in the durable log."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, TypeVar, cast

import msgspec

from sublet._declare import conditions
from sublet._declare.conditions import Condition, OrGroup, UserEventCondition
from sublet._declare.durations import Duration, seconds_of
from sublet._declare.serialization import Codec, check_size
from sublet._durable.replay import memo_operation, run_operation, wait_operation
from sublet._durable.task_tree import Branch
from sublet._errors import TaskRunError
from sublet._worker.context import ChildSpawn, Context, TaskServices
from sublet_protocol import ids, limits
from sublet_protocol.messages import ChildRequest, Completion, Grant, Operation
from sublet_protocol.raw_json import json_bytes
from sublet_protocol.specs import Groups, SleepCondition

if TYPE_CHECKING:
    from sublet._declare.task import Task
    from sublet._durable.invocation import DurableInvocation

T = TypeVar("T")


@dataclass(frozen=True)
class SleepResult:
    """Result of a sleep. ``duration`` is the recorded duration that was asked for."""

    duration: timedelta


class DurableContext(Context):
    """The context of one invocation of a durable task.

    The durable function and the asyncio tasks that it starts (gather, TaskGroup, create_task) are its branches. When
    all branches wait for operations, the task can be evicted from its worker. When there is a result, any worker runs
    the function again from its start, and the operations of earlier invocations return their recorded results. So the
    code must ask for the same operations each time: it may depend on the input, on results of operations and on
    `aio_now`, but not on clocks, random numbers or global variables. Otherwise it fails with `NonDeterminismError`.

    - A branch that waits for anything else (I/O, ``asyncio.sleep``, a timeout) keeps the task on its worker.
    - ``asyncio.as_completed`` starts bare coroutines in any order. Pass it tasks that you created in a fixed order.
    - Open connections in the lifespan of the worker: a background task that a library starts in the durable function
      counts as a branch.
    """

    is_durable = True

    def __init__(
        self, grant: Grant, task: Task[Any, Any], services: TaskServices, invocation: DurableInvocation
    ) -> None:
        super().__init__(grant, task, services)
        self._invocation = invocation
        self._waits = 0

    @property
    def invocation_count(self) -> int:
        """Number of times that the function was started, in this attempt and earlier ones; 1 for the first."""
        return self._grant.invocation

    @property
    def wait_index(self) -> int:
        """Number of waits that this invocation has asked for so far."""
        return self._waits

    # --- waiting --------------------------------------------------------------------------------------------------

    async def aio_sleep_for(self, duration: Duration, label: str | None = None) -> SleepResult:
        """Sleep. The task can be evicted meanwhile.

        Args:
            duration: a timedelta, or a text such as ``"5m"``.
            label: a text for humans, shown in the durable log.

        Raises:
            ValueError: the duration is negative or not understood.
        """
        duration_s = seconds_of(duration, "the duration of a sleep")
        await self._wait(((SleepCondition(key="sleep", duration_s=duration_s),),), label)
        return SleepResult(timedelta(seconds=duration_s))

    async def aio_sleep_until(self, wake_at: datetime, label: str | None = None) -> SleepResult:
        """Sleep until a time; return at once if it has passed. A time without zone is local time."""
        left = wake_at.astimezone(UTC) - await self.aio_now()
        return await self.aio_sleep_for(max(left, timedelta(0)), label)

    async def aio_wait_for(
        self, signal_key: str, *conditions_: Condition | OrGroup, label: str | None = None
    ) -> dict[str, Any]:
        """Wait until all conditions are true. An or-group is true when one of its conditions is true.

        Args:
            signal_key: a text for humans that names the wait.
            conditions_: sleeps, events, and or-groups of these.
            label: a text for humans, shown in the durable log instead of ``signal_key``.

        Returns:
            ``{"CREATE": {readable_data_key: [payload]}}`` with the conditions that came true. The payload of a sleep is
            ``{"duration_s": seconds}``, that of an event is its payload.

        Raises:
            ValueError: there is no condition, or two conditions have the same key.
        """
        where = f"the wait {signal_key!r}"
        if not conditions_:
            raise ValueError(f"{where} needs at least one condition")
        conditions.check_unique_keys([conditions_], where)
        done = await self._wait(conditions.spec_of(conditions_, self._services.config), label or signal_key)
        return cast("dict[str, Any]", _decoded(done))

    async def aio_wait_for_event(
        self,
        key: str,
        expression: str | None = None,
        *,
        payload_validator: type[T] | None = None,
        scope: str | None = None,
        lookback_window: timedelta | None = None,
        label: str | None = None,
    ) -> T | dict[str, Any]:
        """Wait for an event, and return its payload.

        Events count that arrive after the previous operation of this branch has ended. An event that arrives while that
        operation runs (for example a child) is not seen, unless ``lookback_window`` covers it.

        Args:
            key: the key of the event, without namespace.
            expression: CEL. The payload is ``input``. None: every event with this key counts.
            payload_validator: type of the returned payload. None: a dictionary.
            scope: only events with this scope count.
            lookback_window: events of this time before the call count too. Needs a ``scope``.
            label: a text for humans, shown in the durable log.

        Raises:
            ValueError: only one of scope and lookback_window is given, or the expression is not valid CEL.
            pydantic.ValidationError: the payload does not fit ``payload_validator``.
        """
        if (scope is None) != (lookback_window is None):
            raise ValueError("give scope and lookback_window together, or neither")
        since = await self.aio_now() - lookback_window if lookback_window is not None else None
        condition = UserEventCondition(key, expression, scope=scope, consider_events_since=since)
        done = await self._wait(conditions.spec_of([condition], self._services.config), label)
        payload = _decoded(done)["CREATE"][condition.readable_data_key][0]
        return payload if payload_validator is None else Codec[T](payload_validator).check(payload)

    async def _wait(self, groups: Groups, label: str | None) -> Completion:
        branch = await self._invocation.branch()
        self._waits += 1
        (done,) = await self._invocation.wait(
            branch, [wait_operation(branch.next_operation_id(), groups, branch.position, label)]
        )
        return done

    # --- memos ----------------------------------------------------------------------------------------------

    async def aio_now(self) -> datetime:
        """The time (UTC). It is recorded: later invocations get the time of the first call."""
        branch = await self._invocation.branch()
        operation = memo_operation(branch.next_operation_id(), "now", [])
        recorded = self._invocation.log.recall(operation)
        if recorded is None:
            recorded = msgspec.json.encode(datetime.fromtimestamp(self._services.now(), UTC))
            self._invocation.log.ask(msgspec.structs.replace(operation, result=msgspec.Raw(recorded)))
        return msgspec.json.decode(recorded, type=datetime)

    async def aio_memo(
        self, fn: Callable[..., T | Awaitable[T]], result_validator: type[T], /, *args: Any, **kwargs: Any
    ) -> T:
        """Call ``fn(*args, **kwargs)`` once, and record its result. Later invocations get the recorded result.

        If the worker dies before the result is recorded, ``fn`` is called again. So it should be idempotent.

        Args:
            fn: a sync or async function.
            result_validator: type of the result; it must be possible to write it as JSON.

        Raises:
            ValueError: the result is too large.
        """
        branch = await self._invocation.branch()
        name = f"{getattr(fn, '__module__', '')}.{getattr(fn, '__qualname__', type(fn).__qualname__)}"
        operation = memo_operation(branch.next_operation_id(), name, [args, kwargs])
        codec = Codec[T](result_validator)
        recorded = self._invocation.log.recall(operation)
        if recorded is not None:
            return codec.decode(recorded)
        value = fn(*args, **kwargs)
        if inspect.isawaitable(value):
            value = await value
        raw = codec.encode(cast("T", value))
        check_size(raw, f"the result of {name}", limits.PAYLOAD_MAX_BYTES)
        self._invocation.log.ask(msgspec.structs.replace(operation, result=msgspec.Raw(raw)))
        await self._invocation.record()
        return codec.decode(raw)

    _aio_memo = aio_memo

    # --- children -------------------------------------------------------------------------------------------------

    async def _aio_spawn(self, spawns: Sequence[ChildSpawn], wait: bool) -> list[Any]:
        """See `ChildSpawn`."""
        branch = await self._invocation.branch()
        operations = [self._run_operation(branch, spawn) for spawn in spawns]
        if wait:
            self._waits += 1
            done = await self._invocation.wait(branch, operations)
            return [_outcome(spawn, end) for spawn, end in zip(spawns, done, strict=True)]
        for operation in operations:
            self._invocation.log.ask(operation)
        await self._invocation.record()
        return [self._child_run_id(operation) for operation in operations]

    def _run_operation(self, branch: Branch, spawn: ChildSpawn) -> Operation:
        child = ChildRequest(
            workflow=spawn.workflow,
            input=msgspec.Raw(spawn.input_json),
            metadata=spawn.metadata,
            priority=spawn.priority,
            child_key=spawn.child_key,
            child_index=self._next_child_index(),
        )
        return run_operation(branch.next_operation_id(), child)

    def _child_run_id(self, operation: Operation) -> str:
        assert operation.child is not None
        child_key, operation_id = operation.child.child_key, operation.operation_id
        return ids.child_run_id(self.task_run_id, child_key=child_key, operation_id=operation_id)


def _decoded(done: Completion) -> Any:
    if done.error is not None:
        raise TaskRunError(done.error.message, done.error.type, done.error.trace, done.error.task_run_id)
    return msgspec.json.decode(done.result)


def _outcome(spawn: ChildSpawn, done: Completion) -> Any:
    if done.error is not None:
        return TaskRunError(done.error.message, done.error.type, done.error.trace, done.error.task_run_id)
    return spawn.decode(json_bytes(done.result))
