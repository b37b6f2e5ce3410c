"""`replay`: checks that the current code of a durable task repeats the operations of a durable log."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import copy_context
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Literal, TypeVar

import msgspec

from sublet._declare.mocks import MockTaskServices
from sublet._declare.standalone import Standalone
from sublet._declare.task import Task
from sublet._declare.types import EvictionPolicy
from sublet._durable import task_tree
from sublet._durable.context import DurableContext
from sublet._durable.invocation import Checkpoint, DurableInvocation
from sublet._durable.replay import Log
from sublet._errors import NonDeterminismError
from sublet._worker.clock import ActiveClock
from sublet._worker.context import ChildSpawn, current_context, offline
from sublet.testing._loop import WorldLoop
from sublet_protocol import ids
from sublet_protocol.messages import Grant, LogEntry, Operation

T = TypeVar("T")

PATIENCE_S = 600.0
"""Seconds of virtual time for code that does anything else than durable operations. Then the replay ends."""

_OFFLINE = "a replay runs nothing for real: the client cannot be used in it"


class _Exported(msgspec.Struct):
    """An exported log. ``{"entries": […]}`` is enough."""

    entries: tuple[LogEntry, ...]
    task_run_id: str = "replay."
    status: str = ""
    input: msgspec.Raw = msgspec.Raw(b"{}")
    metadata: dict[str, object] = {}
    priority: int = 1
    parents: dict[str, msgspec.Raw] = {}
    skipped: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Divergence:
    """The first difference between code and log.

    Attributes:
        node: the operation id.
        recorded: the recorded operation as text; None if the log ends before it.
        asked: the operation that the code asks for; None if the code never asks for it.
    """

    node: str
    recorded: str | None
    asked: str | None


@dataclass(frozen=True, slots=True, repr=False)
class ReplayReport:
    """Result of `replay`. True if the code repeats the recorded operations; ``str(report)`` says what happened.

    Attributes:
        task_run_id: the task run of the log.
        recorded: number of operations in the log.
        replayed: number of these operations that the code asked for.
        outcome: what the code does at the end: it waits, it returned, it raised an exception, or it works on something
            other than durable operations for too long.
        error: the exception that it raised; None if it raised none.
        goes_on_with: operations that it asks for after the end of the log.
        divergence: the first difference between code and log; None if there is none.
        ended_otherwise: the recorded run completed, but the replay does not.
    """

    task_run_id: str
    recorded: int
    replayed: int
    outcome: Literal["waits", "returned", "raised", "works"]
    error: BaseException | None = None
    goes_on_with: tuple[str, ...] = ()
    divergence: Divergence | None = None
    ended_otherwise: bool = False

    @property
    def ok(self) -> bool:
        """True if there is no difference."""
        return self.divergence is None and not self.ended_otherwise

    def __bool__(self) -> bool:
        return self.ok

    def __repr__(self) -> str:
        return f"<{self}>"

    def __str__(self) -> str:
        counts = f"{self.replayed} of {self.recorded} recorded operations"
        if self.ok:
            return f"replay of {self.task_run_id}: OK, {counts} replayed; the code {self._then}"
        lines = [f"replay of {self.task_run_id} DIVERGES after {counts}"]
        if self.divergence is not None:
            lines += [
                f"  at node:     {self.divergence.node}",
                f"  recorded is: {self.divergence.recorded or 'nothing, the run completed before'}",
                f"  asked for:   {self.divergence.asked or 'nothing'}",
            ]
        return "\n".join([*lines, f"  the code {self._then}"])

    @property
    def _then(self) -> str:
        match self.outcome:
            case "returned":
                return "returned"
            case "raised":
                return f"raised {type(self.error).__name__}: {self.error}"
            case "works":
                return f"does something else than durable operations for more than {PATIENCE_S:g} s"
            case "waits" if self.goes_on_with:
                return f"goes on with {'; '.join(self.goes_on_with)}"
            case _:
                return "waits for what the recorded run waited for"


def replay(
    log: Mapping[str, Any] | str | bytes | Path, task: Task[Any, Any] | Standalone[Any, Any], *, input: Any = None
) -> ReplayReport:
    """Run the code of a durable task against a durable log.

    Operations return their recorded results: the replay does not sleep, wait for events, start children or call
    functions of memos, and it ends where the log ends. Code between the operations really runs. The client cannot be
    used in it (RuntimeError).

    Args:
        log: the result of `export_log` or ``env.log``: a dictionary, JSON text, or the path of a JSON file.
        task: the current version of the durable task.
        input: the input of the run, if the log does not contain it.

    Raises:
        TypeError: the task is not durable.
        msgspec.ValidationError: ``log`` is not an exported log.
        pydantic.ValidationError: ``input`` does not fit the declared type.
    """
    task = task.task if isinstance(task, Standalone) else task
    if not task.is_durable:
        raise TypeError(f"{task!r} is not durable: it has no log")
    exported = _read(log)
    if input is not None:
        codec = task._input_codec
        exported.input = msgspec.Raw(codec.encode(codec.check(input)))
    with ThreadPoolExecutor(1) as thread:  # the caller may be in an event loop
        return thread.submit(copy_context().run, _Replay(exported, task).run).result()


def _read(log: Mapping[str, Any] | str | bytes | Path) -> _Exported:
    if isinstance(log, Path):
        log = log.read_bytes()
    elif isinstance(log, Mapping):
        log = msgspec.json.encode(log)
    return msgspec.json.decode(log, type=_Exported)


class _Replay:
    """One replay. It is the `InvocationHost` of the code."""

    draining = False

    def __init__(self, exported: _Exported, task: Task[Any, Any]) -> None:
        self._exported = exported
        self._task = task
        self._grant = _grant(exported, task)
        self._log = _ReplayedLog(self._grant)
        self._error: BaseException | None = None
        self._all_wait: asyncio.Future[None]

    def run(self) -> ReplayReport:
        loop = WorldLoop()
        try:
            replaying = loop.create_task(self._replay())
            loop.turn()
            while not replaying.done():
                if loop.busy_threads:
                    loop.wait_for_thread()
                else:
                    loop.jump_to(loop.timers[0].when())
                loop.turn()
            return self._report(replaying.result())
        finally:
            loop.close()

    async def _replay(self) -> Literal["waits", "returned", "raised", "works"]:
        loop = asyncio.get_running_loop()
        task_tree.install(loop)
        self._all_wait = loop.create_future()
        invocation = DurableInvocation(
            self._grant, EvictionPolicy(ttl=timedelta(0)), ActiveClock(loop.time, math.inf), self
        )
        invocation.log = self._log
        context = _ReplayedContext(self._grant, self._task, MockTaskServices(self._task), invocation)
        code = invocation.start(self._run(context), copy_context())
        await asyncio.wait([code, self._all_wait], timeout=PATIENCE_S, return_when=asyncio.FIRST_COMPLETED)
        if code.done():
            invocation.finish()
            return "raised" if self._error is not None else "returned"
        await invocation.drop()
        return "waits" if self._all_wait.done() else "works"

    async def _run(self, context: DurableContext) -> None:
        current_context.set(context)
        offline.set(_OFFLINE)
        try:
            await self._task.fn(self._task.decode_input(bytes(self._grant.input)), context)
        except BaseException as error:
            if not self._all_wait.done():
                self._error = error

    def record(self, operations: tuple[Operation, ...], *, waiting: bool) -> asyncio.Future[None]:
        return asyncio.get_running_loop().create_future()

    def report_eviction(self, checkpoint: Checkpoint) -> None:
        self._all_wait.set_result(None)

    def begins_to_wait(self) -> None:
        """Nothing to do: slots do not run short in a replay."""

    def _report(self, outcome: Literal["waits", "returned", "raised", "works"]) -> ReplayReport:
        log, completed = self._log, self._exported.status == "COMPLETED"
        divergence = log.divergence
        unasked = [entry for entry in self._exported.entries if entry.operation_id not in log.answered]
        if divergence is None and unasked:
            divergence = Divergence(unasked[0].operation_id, unasked[0].asked, log.new.get(unasked[0].operation_id))
        if divergence is None and log.new and completed:
            operation_id, asked = next(iter(log.new.items()))
            divergence = Divergence(operation_id, None, asked)
        return ReplayReport(
            task_run_id=self._exported.task_run_id,
            recorded=len(self._exported.entries),
            replayed=len(log.answered),
            outcome=outcome,
            error=self._error,
            goes_on_with=tuple(f"{asked} (node {node})" for node, asked in log.new.items()),
            divergence=divergence,
            ended_otherwise=completed and outcome != "returned",
        )


class _ReplayedLog(Log):
    """A log that remembers what the code asked for.

    Attributes:
        answered: ids of recorded operations that the code asked for.
        new: operations that the code asked for after the end of the log, as text by operation id.
        divergence: the first operation that differs from the recorded one.
    """

    def __init__(self, grant: Grant) -> None:
        super().__init__(grant)
        self._recorded_ids = {entry.operation_id for entry in grant.log}
        self.answered: set[str] = set()
        self.new: dict[str, str] = {}
        self.divergence: Divergence | None = None

    def ask(self, operation: Operation) -> None:
        with self._compared(operation):
            super().ask(operation)

    def recall(self, memo: Operation) -> bytes | None:
        with self._compared(memo):
            return super().recall(memo)

    @contextmanager
    def _compared(self, operation: Operation) -> Iterator[None]:
        try:
            yield
        except NonDeterminismError:
            recorded = self._entries[operation.operation_id].asked
            self.divergence = self.divergence or Divergence(operation.operation_id, recorded, operation.asked)
            raise
        if operation.operation_id in self._recorded_ids:
            self.answered.add(operation.operation_id)
        else:
            self.new.setdefault(operation.operation_id, operation.asked)


class _ReplayedContext(DurableContext):
    """A context that waits without end for every operation after the end of the log, so that none really happens."""

    @property
    def _log(self) -> _ReplayedLog:
        assert isinstance(self._invocation.log, _ReplayedLog)
        return self._invocation.log

    async def aio_now(self) -> datetime:
        new_before = len(self._log.new)
        now = await super().aio_now()
        if len(self._log.new) > new_before:
            await self._wait_without_end()
        return now

    async def aio_memo(
        self, fn: Callable[..., T | Awaitable[T]], result_validator: type[T], /, *args: Any, **kwargs: Any
    ) -> T:
        async def first_call(*_: Any, **__: Any) -> T:
            await self._wait_without_end()
            raise AssertionError("nothing ends beyond the log")

        first_call.__module__ = getattr(fn, "__module__", "")
        first_call.__qualname__ = getattr(fn, "__qualname__", type(fn).__qualname__)
        return await super().aio_memo(first_call, result_validator, *args, **kwargs)

    _aio_memo = aio_memo

    async def _aio_spawn(self, spawns: Sequence[ChildSpawn], wait: bool) -> list[Any]:
        if wait:
            return await super()._aio_spawn(spawns, wait)
        branch = await self._invocation.branch()
        operations = [self._run_operation(branch, spawn) for spawn in spawns]
        for operation in operations:
            self._log.ask(operation)
        if any(operation.operation_id in self._log.new for operation in operations):
            await self._wait_without_end()
        return [self._child_run_id(operation) for operation in operations]

    async def _wait_without_end(self) -> None:
        await self._invocation._until_delivered(("beyond the log",))


def _grant(exported: _Exported, task: Task[Any, Any]) -> Grant:
    task_run_id = exported.task_run_id
    return Grant(
        ticket="replay",
        lease=ids.lease_id(task_run_id, 1),
        workflow=task.workflow_name,
        version="",
        task=task.name,
        input=exported.input,
        retry_count=0,
        invocation=1,
        timeout_s=math.inf,
        metadata=exported.metadata,
        priority=exported.priority,
        parents=exported.parents,
        skipped=exported.skipped,
        log=exported.entries,
    )
