"""`replay`: does today's code do again what a durable log has recorded? Nothing of the log is run for real."""

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
"""Code that does something else than durable operations has this long, in time that is skipped."""

_OFFLINE = "a replay runs nothing for real: the client cannot be used in it"


class _Exported(msgspec.Struct):
    """What `export_log` gives. A bare ``{"entries": […]}`` will do."""

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
    """The first place where code and log differ. ``recorded`` None: the log ends there. ``asked`` None: the code never
    asks for it."""

    node: str
    recorded: str | None
    asked: str | None


@dataclass(frozen=True, slots=True, repr=False)
class ReplayReport:
    """True if the code does again what is recorded; its text says what happened.

    Attributes:
        task_run_id: whose log it is.
        recorded: how many operations the log holds.
        replayed: how many of them the code asked for, and got.
        outcome: whether the code then waits, has returned, has raised, or goes on with something else for too long.
        error: what it raised.
        goes_on_with: what it asks for after the end of the log.
        divergence: where it left the log; None if it did not.
        ended_otherwise: the recorded run completed, and this one does not.
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
    """Run the code of ``task`` against a durable log.

    Every operation is answered from the log: nothing is slept, waited for or started, memoised functions are not
    called, and where the log ends, so does the replay. What the code does between its operations it really does, as
    in every replay; the client refuses to be used.

    Args:
        log: what `export_log` (or ``env.log``) gave; as a dictionary, as JSON text, or the path of a file of it.
        task: a durable task, as it is today.
        input: of the run, for a log that does not hold it.

    Raises:
        TypeError: the task is not durable.
        msgspec.ValidationError: that is no exported log.
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
    """One replay: it is the worker of the code, too (see `sublet.stay.Host`)."""

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
        stay = DurableInvocation(self._grant, EvictionPolicy(ttl=timedelta(0)), ActiveClock(loop.time, math.inf), self)
        stay.log = self._log
        context = _ReplayedContext(self._grant, self._task, MockTaskServices(self._task), stay)
        code = stay.start(self._run(context), copy_context())
        await asyncio.wait([code, self._all_wait], timeout=PATIENCE_S, return_when=asyncio.FIRST_COMPLETED)
        if code.done():
            stay.finish()
            return "raised" if self._error is not None else "returned"
        await stay.drop()
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
        """There is always room."""

    def _report(self, outcome: Literal["waits", "returned", "raised", "works"]) -> ReplayReport:
        log, completed = self._log, self._exported.status == "COMPLETED"
        divergence = log.divergence
        unasked = [entry for entry in self._exported.entries if entry.operation_id not in log.answered]
        if divergence is None and unasked:
            divergence = Divergence(unasked[0].operation_id, unasked[0].asked, log.new.get(unasked[0].operation_id))
        if divergence is None and log.new and completed:
            node, asked = next(iter(log.new.items()))
            divergence = Divergence(node, None, asked)
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
    """Keeps the books. ``answered``: the nodes that the code asked for as recorded; ``new``: what it asked for beyond
    the log, by node."""

    def __init__(self, grant: Grant) -> None:
        super().__init__(grant)
        self._recorded_nodes = {entry.operation_id for entry in grant.log}
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
        if operation.operation_id in self._recorded_nodes:
            self.answered.add(operation.operation_id)
        else:
            self.new.setdefault(operation.operation_id, operation.asked)


class _ReplayedContext(DurableContext):
    """Where the log ends, whatever is asked for is waited for: nothing is done for the first time."""

    @property
    def _log(self) -> _ReplayedLog:
        assert isinstance(self._invocation.log, _ReplayedLog)
        return self._invocation.log

    async def aio_now(self) -> datetime:
        beyond = len(self._log.new)
        now = await super().aio_now()
        if len(self._log.new) > beyond:
            await self._wait_for_ever()
        return now

    async def aio_memo(
        self, fn: Callable[..., T | Awaitable[T]], result_validator: type[T], /, *args: Any, **kwargs: Any
    ) -> T:
        async def first_call(*_: Any, **__: Any) -> T:
            await self._wait_for_ever()
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
            await self._wait_for_ever()
        return [self._child_run_id(operation) for operation in operations]

    async def _wait_for_ever(self) -> None:
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
