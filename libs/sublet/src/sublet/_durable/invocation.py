"""One invocation of a durable task: delivers results to its code, and decides when the code is evicted."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Sequence
from contextvars import Context
from dataclasses import dataclass
from typing import Any, Protocol

from sublet._declare.types import EvictionPolicy
from sublet._durable.quiescence import DurableWait, TreeState, tree_state
from sublet._durable.replay import Log
from sublet._durable.task_tree import Branch, BranchTask, Tree, current_branch
from sublet._worker.clock import ActiveClock
from sublet_protocol.messages import Completion, Grant, Operation

TREE_CHECK_INTERVAL_S = 0.05
"""Seconds between checks of the tree while one branch waits and another works on something that gives no signal when it
ends (I/O, a timer, a thread)."""

RUNNABLE_CHECKS_MAX = 50
"""Checks in a row that may find a branch runnable. After that it counts as working: it may be polling."""

GAP_PATIENCE_S = 2.0
"""Seconds that a result is held back for a branch that is slower than in the first invocation. It is limited, because
code that depends on something outside the log may never ask for the earlier result."""

UNINTERRUPTED_RESULTS = 200
"""Results of a replay that are delivered without giving control to the event loop, so that other tasks are not
blocked by a long replay."""

CANCELS_MAX = 5
"""How often code that has to end is cancelled. After that it is left running, and a warning is logged."""
CANCEL_PAUSE_S = 1.0
"""Seconds between these cancellations, for the clean-up of the code."""

REFUSALS_MAX = 20
"""Operations of ended code that are refused by a cancellation, and then as many by `InvocationEnded`."""

logger = logging.getLogger(__name__)


class InvocationEnded(BaseException):
    """Ends code that catches its cancellations and continues."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What the scheduler needs to know about an evicted task."""

    operations: tuple[Operation, ...]
    """New operations of the durable log."""
    blocked: tuple[tuple[str, ...], ...]
    """Operation ids of each wait. The task is resumed when all operations of one of them have ended."""
    delivered: int
    """Results up to this order have arrived here. The task is resumed at once if there are newer ones."""
    cause: str


class InvocationHost(Protocol):
    """What an invocation needs of the worker."""

    @property
    def draining(self) -> bool:
        """The worker is shutting down, so every waiting task is evicted."""

    def record(self, operations: tuple[Operation, ...], *, waiting: bool) -> asyncio.Future[None]:
        """Report new operations of code that stays on the worker. The future ends when RabbitMQ has confirmed it."""

    def report_eviction(self, checkpoint: Checkpoint) -> None:
        """Report the eviction. `DurableInvocation.drop` is called when the report is confirmed."""

    def begins_to_wait(self) -> None:
        """Called when every branch waits and the code stays: it can be evicted if slots run short."""


class DurableInvocation:
    """Call `start` once, and `complete` for each operation that the scheduler reports as ended.

    Attributes:
        waiting_since: since when every branch waits, in seconds of the event loop's time; None while one works.
        ended: the lease has ended or is about to end. Nothing that the code still does counts.
    """

    def __init__(self, grant: Grant, policy: EvictionPolicy | None, clock: ActiveClock, host: InvocationHost) -> None:
        self._loop = asyncio.get_running_loop()
        self._policy = policy
        self._clock = clock
        self._host = host
        self._tree = Tree(grant.position, self._check_soon)
        self._open: dict[DurableWait, None] = {}
        self._check: asyncio.Handle | None = None
        self._runnable_checks = 0
        self._gap_since: float | None = None
        self._reported_waiting = False
        self._uninterrupted = 0
        self._refusals = 0
        self.log = Log(grant)
        self.name = grant.lease
        self.ended = False
        self.waiting_since: float | None = None

    def start(self, coro: Coroutine[Any, Any, Any], context: Context) -> BranchTask:
        return self._tree.start(coro, context)

    # --- for the code ---------------------------------------------------------------------------------------------

    async def branch(self) -> Branch:
        """The branch of the code that calls this.

        Raises:
            CancelledError: this invocation has ended.
            RuntimeError: the calling code is not part of the durable task.
        """
        if self.ended:
            await self._refuse()
        branch = current_branch()
        if branch is None or branch.tree is not self._tree:
            raise RuntimeError(
                "durable operations can be used in the durable function and the asyncio tasks that it starts, not in"
                " threads or tasks that were started elsewhere"
            )
        return branch

    async def wait(self, branch: Branch, operations: Sequence[Operation]) -> list[Completion]:
        """Ask for operations, and wait until all of them have ended. Results are in the order of the operations."""
        if not operations:
            return []
        for operation in operations:
            self.log.ask(operation)
        operation_ids = tuple(operation.operation_id for operation in operations)
        await self._until_delivered(operation_ids)
        done = [self.log.done(operation_id) for operation_id in operation_ids]
        branch.advance_position(max((end.position for end in done), default=0))
        return done

    async def record(self) -> None:
        """Wait until all operations that were asked for are recorded."""
        new = self.log.take_new()
        if new:
            self._reported_waiting = False
            await self._host.record(new, waiting=False)
            if self.ended:
                await self._refuse()

    async def _until_delivered(self, operation_ids: tuple[str, ...]) -> None:
        alone = len(self._tree.live) == 1 and not self._open
        if alone and self.log.rank(operation_ids) is not None and self._uninterrupted < UNINTERRUPTED_RESULTS:
            self._uninterrupted += 1
            return
        self._uninterrupted = 0
        wait = DurableWait(operation_ids, loop=self._loop)
        self._open[wait] = None
        self._check_soon()
        try:
            await wait
        finally:
            self._open.pop(wait, None)

    async def _refuse(self) -> None:
        """End code that continues after its end: by a cancellation, then by `InvocationEnded`, then by never
        returning."""
        self._refusals += 1
        await asyncio.sleep(0)
        if self._refusals <= REFUSALS_MAX:
            raise asyncio.CancelledError(f"{self.name} has ended")
        if self._refusals <= 2 * REFUSALS_MAX:
            raise InvocationEnded(f"{self.name} has ended")
        await self._loop.create_future()

    # --- for the worker -------------------------------------------------------------------------------------------

    def complete(self, operation_id: str, done: Completion) -> None:
        """Deliver the result of an operation. Ignored after the end: the next invocation finds it in the log."""
        if not self.ended:
            self.log.end(operation_id, done)
            self._reported_waiting = False
            self._check_soon()

    def check(self) -> None:
        """Decide again soon, for example because the worker has begun to drain."""
        self._check_soon()

    def evict(self, cause: str, *, blocked_locally: bool = False) -> None:
        """Leave the worker while every branch waits.

        ``blocked_locally``: some branches wait for a lock or the like instead of an operation. No operation could wake
        the task then, so it is ready again at once.
        """
        blocked = () if blocked_locally else tuple(wait.operation_ids for wait in self._open)
        self._clock.pause()
        self._host.report_eviction(Checkpoint(self.log.take_new(), blocked, self.log.received, cause))
        self._close()  # after the report, because nothing is reported after the end

    @property
    def may_be_evicted_for_capacity(self) -> bool:
        waits = self.waiting_since is not None and not self.ended
        return waits and self._policy is not None and self._policy.allow_capacity_eviction

    @property
    def eviction_order(self) -> tuple[int, float]:
        """The smallest is evicted first: the lowest priority, then the longest wait."""
        return (self._policy.priority if self._policy is not None else 0, self.waiting_since or 0.0)

    def finish(self) -> None:
        """The function has returned or failed. Waits that it left open are cancelled."""
        self._close()
        for wait in list(self._open):
            wait.cancel()

    async def drop(self) -> None:
        """Cancel the code. Catching the cancellation does not help it: all further operations are refused."""
        self._close()
        self._tree.abandoned = True
        for _ in range(CANCELS_MAX):
            for task in list(self._tree.live):
                task.cancel()
            await asyncio.sleep(0)  # enough for code that has nothing to clean up
            await asyncio.sleep(0)
            if not self._tree.live:
                return
            await asyncio.wait(list(self._tree.live), timeout=CANCEL_PAUSE_S)
        if self._tree.live:
            logger.warning("code of %s has caught %d cancellations and is left running", self.name, CANCELS_MAX)

    def _close(self) -> None:
        self.ended = True
        self._clock.pause()
        if self._check is not None:
            self._check.cancel()
            self._check = None

    # --- deciding -------------------------------------------------------------------------------------------------

    def _check_soon(self) -> None:
        self._schedule_check(self._loop.call_soon)

    def _check_later(self, delay_s: float) -> None:
        self._schedule_check(lambda callback, context: self._loop.call_later(delay_s, callback, context=context))

    def _schedule_check(self, schedule: Callable[..., asyncio.Handle]) -> None:
        if self._check is not None:
            self._check.cancel()
        self._check = None if self.ended else schedule(self._decide, context=Context())

    def _decide(self) -> None:
        """Deliver the next result, wait for the code, or evict it. Runs after every operation and end of a branch."""
        self._check = None
        state = tree_state(self._tree.live)
        if state is TreeState.RUNNABLE and self._runnable_checks < RUNNABLE_CHECKS_MAX:
            self._runnable_checks += 1
            self._check_soon()
            return
        self._runnable_checks = 0
        first = self._first_deliverable()
        if first is not None and not self._waits_for_gap(first[0], state):
            self._deliver(first[1])
        elif not self._open:
            return
        elif state is TreeState.BLOCKED:
            self._all_branches_wait()
        elif state is TreeState.BLOCKED_LOCALLY and self._host.draining:
            self.evict("worker_shutdown", blocked_locally=True)
        else:
            self._some_branch_works()

    def _first_deliverable(self) -> tuple[int, DurableWait] | None:
        """The open wait whose operations ended first, with its rank; None if none of them can be delivered."""
        ranked = [
            (rank, wait)
            for wait in self._open
            if not wait.done() and (rank := self.log.rank(wait.operation_ids)) is not None
        ]
        return min(ranked, key=lambda pair: pair[0], default=None)

    def _waits_for_gap(self, rank: int, state: TreeState) -> bool:
        """In the first invocation another result came earlier, and a working branch may still ask for it."""
        if state is TreeState.BLOCKED or not self.log.runs_ahead(rank):
            self._gap_since = None
            return False
        if self._gap_since is None:
            self._gap_since = self._loop.time()
        return self._loop.time() - self._gap_since < GAP_PATIENCE_S

    def _deliver(self, wait: DurableWait) -> None:
        self._gap_since = None
        self.waiting_since = None
        self._reported_waiting = False
        self._clock.resume()
        wait.set_result(None)
        self._check_soon()

    def _some_branch_works(self) -> None:
        """Report new waits although the code stays, so that their timers and subscriptions are set."""
        self.waiting_since = None
        self._clock.resume()
        if self.log.has_new_operation or self._reported_waiting:
            self._reported_waiting = False
            self._host.record(self.log.take_new(), waiting=False)
        self._check_later(TREE_CHECK_INTERVAL_S)

    def _all_branches_wait(self) -> None:
        self._clock.pause()
        now = self._loop.time()
        if self.waiting_since is None:
            self.waiting_since = now
        ttl_s = self._policy.ttl.total_seconds() if self._policy is not None and self._policy.ttl is not None else None
        left_s = ttl_s - (now - self.waiting_since) if ttl_s is not None else None
        if self._host.draining:
            self.evict("worker_shutdown")
        elif left_s is not None and left_s <= 0:
            self.evict("ttl_exceeded" if ttl_s else "waiting")
        else:
            self._stay_waiting()
            if left_s is not None and not self.ended:
                self._check_later(left_s)

    def _stay_waiting(self) -> None:
        if self.log.has_new_operation or not self._reported_waiting:
            self._reported_waiting = True
            self._host.record(self.log.take_new(), waiting=True)
        self._host.begins_to_wait()
