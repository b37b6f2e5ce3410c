"""Runs the code of one grant, and reports how it ended."""

from __future__ import annotations

import asyncio
import concurrent.futures
from collections.abc import Callable, Mapping
from contextvars import Context as Variables
from contextvars import copy_context
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from sublet._client.config import ClientConfig
from sublet._declare.serialization import task_error
from sublet._declare.task import Task
from sublet._durable.context import DurableContext
from sublet._durable.invocation import Checkpoint, DurableInvocation
from sublet._errors import NonRetryableException
from sublet._worker.clock import ActiveClock
from sublet._worker.context import Context, current_context
from sublet._worker.tickets import HeldTicket
from sublet_protocol import ids, limits
from sublet_protocol.messages import (
    CancelRun,
    Evicted,
    Failed,
    Finished,
    Grant,
    HeldLease,
    Operation,
    Record,
    Recorded,
    SlotReleased,
    TaskError,
    TimeoutExtended,
)
from sublet_protocol.raw_json import NULL
from sublet_protocol.specs import SlotKind

if TYPE_CHECKING:
    from sublet._worker.runner import Runner


class Execution:
    """One task that runs under a lease of this worker.

    Who owns which fact:

    - `DurableInvocation` knows whether a durable task waits (``waiting_since``) and whether its code has ended
      (``ended``), because its code can leave the worker by an eviction.
    - `Execution` knows whether the code of an ordinary task has ended, whether the task is cancelled, and whether it
      still holds its slot and its ticket.
    - `Runner` knows which leases this worker has: an execution stays listed until RabbitMQ has confirmed its end.
    - `Tickets` knows what a ticket is used for.

    An execution ends exactly once: by the result of the function, by an eviction, by its timeout, or because its lease
    was revoked.

    Attributes:
        ticket: None after the task has released its slot, and for a task without a ticket (see `Tickets`).
        released: the slot is released, or will be as soon as the report is confirmed.
        holds_slot: the slot is still counted as taken.
        is_cancelled: the code should stop; nothing that it returns counts.
    """

    def __init__(self, runner: Runner, grant: Grant, task: Task[Any, Any], ticket: HeldTicket | None) -> None:
        self._runner = runner
        self._loop = asyncio.get_running_loop()
        self._grant = grant
        self._task = task
        self._code: asyncio.Future[Any] | None = None
        self._release: asyncio.Future[None] | None = None
        self._number = 0
        self.lease = grant.lease
        self.kind: SlotKind = "durable" if task.is_durable else "task"
        self.ticket = ticket
        self.released = False
        self.holds_slot = True
        self.is_cancelled = False
        self._has_ended = False
        self.clock = ActiveClock(self._loop.time, grant.timeout_s)
        self.durable_invocation = (
            DurableInvocation(grant, task.eviction_policy, self.clock, self) if task.is_durable else None
        )

    @property
    def state(self) -> Literal["running", "waiting", "released"]:
        """``waiting``: a durable task that waits and stays on the worker. ``released``: it runs without a slot."""
        if self.released:
            return "released"
        waits = self.durable_invocation is not None and self.durable_invocation.waiting_since is not None
        return "waiting" if waits else "running"

    @property
    def ended(self) -> bool:
        """The end is reported, or the lease is lost: nothing that the code still does counts."""
        return self.durable_invocation.ended if self.durable_invocation is not None else self._has_ended

    # --- running --------------------------------------------------------------------------------------------------

    def start(self) -> None:
        if self.durable_invocation is not None:
            context: Context = DurableContext(self._grant, self._task, self, self.durable_invocation)
            self._code = self.durable_invocation.start(self._run(context), self._runner.variables.copy())
        else:
            context = Context(self._grant, self._task, self)
            self._code = self._loop.create_task(self._run(context), context=self._runner.variables.copy())

    async def _run(self, context: Context) -> None:
        """Run the user's code and report its end. Does not raise, whatever the code raises."""
        try:
            current_context.set(context)
            output = await self._call(context)
            encoded = self._task.encode_output(output)
        except BaseException as error:  # SystemExit too: a task does not stop its worker
            if not self.ended:
                if self.is_cancelled:
                    self._runner.revoked(self)
                else:
                    self._fail(
                        task_error(error, ids.task_run_of(self.lease)),
                        retryable=not isinstance(error, NonRetryableException),
                    )
        else:
            if not self.ended:
                self._finish(encoded)

    async def _call(self, context: Context) -> Any:
        given = self._task.decode_input(bytes(self._grant.input))
        if self._task.is_async_function:
            return await self._task.fn(given, context)
        return await self._loop.run_in_executor(self._runner.threads, copy_context().run, self._task.fn, given, context)

    # --- ending ---------------------------------------------------------------------------------------------------

    def _finish(self, output: bytes | None) -> None:
        if self.is_cancelled:
            self._runner.revoked(self)
            return
        raw = NULL if output is None else msgspec.Raw(output)
        self._end()
        self._runner.report_end(self, lambda ticket, more: Finished(self.lease, ticket, raw, next=more))

    def _fail(self, error: TaskError, *, retryable: bool) -> None:
        self._end()
        self._runner.report_end(
            self, lambda ticket, more: Failed(self.lease, ticket, error, retryable=retryable, next=more)
        )

    def time_out(self) -> None:
        """End the attempt: it has used up its execution timeout."""
        if self.ended:
            return
        message = f"Task exceeded timeout of {self.clock.allowed_s:g} s"
        self.is_cancelled = True
        self._fail(TaskError("TimeoutError", message, task_run_id=ids.task_run_of(self.lease)), retryable=True)
        self._runner.spawn(self.stop_code())

    def _end(self) -> None:
        if self.durable_invocation is not None:
            self.durable_invocation.finish()
        else:
            self._has_ended = True
            self.clock.pause()

    def forget(self) -> None:
        """End without a report: the lease is lost."""
        self._end()

    async def stop_code(self) -> None:
        """Cancel the code. A thread cannot be cancelled: its result is ignored."""
        if self.durable_invocation is not None:
            await self.durable_invocation.drop()
        elif self._code is not None and not self._code.done():
            self._code.cancel()
            await asyncio.wait([self._code], timeout=limits.CANCEL_GRACE_S)

    # --- durable tasks (see `invocation.InvocationHost`) ----------------------------------------------------------

    @property
    def draining(self) -> bool:
        return self._runner.draining

    @property
    def held_lease(self) -> HeldLease:
        return (
            HeldLease(self.lease, self.durable_invocation.log.received)
            if self.durable_invocation is not None
            else HeldLease(self.lease)
        )

    def record(self, operations: tuple[Operation, ...], *, waiting: bool) -> asyncio.Future[None]:
        rest = self._report_leading_chunks(operations)
        return self._report(Recorded(self.lease, rest, waiting, self.clock.active_s, number=self._next_number()))

    def _report_leading_chunks(self, operations: tuple[Operation, ...]) -> tuple[Operation, ...]:
        """Report all portions but the last, which is returned for the caller's own report."""
        *portions, last = _chunked(operations)
        for portion in portions:
            self._report(Recorded(self.lease, portion, number=self._next_number()))
        return last

    def report_eviction(self, checkpoint: Checkpoint) -> None:
        rest = self._report_leading_chunks(checkpoint.operations)

        def report(ticket: str | None, more: bool) -> Record:
            return Evicted(
                self.lease,
                ticket,
                rest,
                checkpoint.blocked,
                checkpoint.delivered,
                self.clock.active_s,
                checkpoint.cause,
                next=more,
            )

        assert self.durable_invocation is not None
        confirmed = self._runner.report_end(self, report)
        drop = self.durable_invocation.drop
        confirmed.add_done_callback(lambda _: self._runner.spawn(drop()), context=Variables())

    def begins_to_wait(self) -> None:
        self._runner.evict_for_capacity()

    # --- for the task's code (see `context.TaskServices`) ---------------------------------------------------------

    @property
    def worker_id(self) -> str:
        return self._runner.worker_id

    @property
    def worker_labels(self) -> Mapping[str, str | int]:
        return self._runner.labels

    @property
    def lifespan(self) -> Any:
        return self._runner.lifespan

    @property
    def config(self) -> ClientConfig:
        return self._runner.config

    def now(self) -> float:
        return self._runner.now()

    def release_slot(self) -> asyncio.Future[None]:
        if self._release is None:
            self._release = self._runner.spawn(self._release_slot())
        return self._release

    async def _release_slot(self) -> None:
        """Acknowledge the ticket only after the report is confirmed: otherwise the slot could be used twice."""
        await self._runner.releases.acquire()
        if self.ended:
            self._runner.releases.release()
            raise asyncio.CancelledError(f"{self.lease} has ended")
        self.released = True
        await self._report(SlotReleased(self.lease))
        self._runner.free_slot(self)

    def extend(self, by_s: float) -> asyncio.Future[None]:
        if not self.ended:
            self.clock.extend(by_s)
        return self._report(TimeoutExtended(self.lease, by_s, number=self._next_number()))

    def cancel(self) -> asyncio.Future[None]:
        return self._report(CancelRun(ids.run_of(self.lease), ids.task_run_of(self.lease)))

    def from_sync(self, start: Callable[[], asyncio.Future[None]]) -> None:
        if self._runner.in_loop_thread:
            start()
            return
        ended: concurrent.futures.Future[None] = concurrent.futures.Future()

        def settle(future: asyncio.Future[None]) -> None:
            if future.cancelled():
                ended.cancel()
            else:
                ended.set_result(None)

        def begin() -> None:
            start().add_done_callback(settle)

        self._loop.call_soon_threadsafe(begin, context=Variables())
        ended.result()

    def _report(self, report: Record) -> asyncio.Future[None]:
        """Send a report. After the end nothing is sent, and the future is cancelled."""
        if self.ended:
            refused: asyncio.Future[None] = self._loop.create_future()
            refused.cancel()
            return refused
        return self._runner.report(self.lease, report)

    def _next_number(self) -> int:
        self._number += 1
        return self._number


def _chunked(operations: tuple[Operation, ...]) -> list[tuple[Operation, ...]]:
    """Split operations into portions of at most `limits.REPORT_MAX_BYTES`, in order. There is at least one portion; it
    may be empty."""
    portions: list[list[Operation]] = [[]]
    size = 0
    for operation in operations:
        weight = len(operation.result) + (len(operation.child.input) if operation.child is not None else 0)
        if portions[-1] and size + weight > limits.REPORT_MAX_BYTES:
            portions.append([])
            size = 0
        portions[-1].append(operation)
        size += weight
    return [tuple(portion) for portion in portions]
