"""One stay of a durable task on a worker: it delivers results to the code, and decides when the code has to leave."""

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
    """For code that catches cancellations and goes on."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What the scheduler needs to know when the code leaves."""

    operations: tuple[Operation, ...]
    blocked: tuple[tuple[str, ...], ...]
    delivered: int
    cause: str


class InvocationHost(Protocol):
    """What a stay needs of the worker."""

    @property
    def draining(self) -> bool:
        """The worker is leaving: whatever waits must go."""

    def record(self, operations: tuple[Operation, ...], *, waiting: bool) -> asyncio.Future[None]:
        """Report new operations of code that stays. The future ends with the broker's confirm."""

    def report_eviction(self, checkpoint: Checkpoint) -> None:
        """Report the checkpoint; `DurableInvocation.drop` is called once it is safe."""

    def begins_to_wait(self) -> None:
        """Every branch waits, and the code stays: if slots run short it can be evicted."""


class DurableInvocation:
    """``start`` it, and tell it what the scheduler says by ``complete``. ``waiting_since`` is in loop time."""

    def __init__(self, grant: Grant, policy: EvictionPolicy | None, clock: ActiveClock, host: InvocationHost) -> None:
        self._loop = asyncio.get_running_loop()
        self._policy = policy
        self._clock = clock
        self._host = host
        self._tree = Tree(grant.position, self._look_soon)
        self._open: dict[DurableWait, None] = {}
        self._look: asyncio.Handle | None = None
        self._runnable_checks = 0
        self._held_since: float | None = None
        self._told_waiting = False
        self._uninterrupted = 0
        self._refusals = 0
        self.log = Log(grant)
        self.name = grant.lease
        self.over = False
        """The lease has ended, or is about to: nothing that the code still does counts."""
        self.waiting_since: float | None = None

    def start(self, coro: Coroutine[Any, Any, Any], context: Context) -> BranchTask:
        return self._tree.start(coro, context)

    # --- for the code ---------------------------------------------------------------------------------------------

    async def branch(self) -> Branch:
        """The branch that asks.

        Raises:
            CancelledError: this invocation has ended.
            RuntimeError: the caller is no part of the durable task.
        """
        if self.over:
            await self._refuse()
        branch = current_branch()
        if branch is None or branch.tree is not self._tree:
            raise RuntimeError(
                "durable operations can be used in the durable function and the asyncio tasks that it starts, not in"
                " threads or tasks that were started elsewhere"
            )
        return branch

    async def wait(self, branch: Branch, operations: Sequence[Operation]) -> list[Completion]:
        """Ask for operations, and wait until all of them have ended. In the order given."""
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
        """Returns when what was asked for is recorded."""
        new = self.log.take_new()
        if new:
            self._told_waiting = False
            await self._host.record(new, waiting=False)
            if self.over:
                await self._refuse()

    async def _until_delivered(self, operation_ids: tuple[str, ...]) -> None:
        alone = len(self._tree.live) == 1 and not self._open
        if alone and self.log.rank(operation_ids) is not None and self._uninterrupted < UNINTERRUPTED_RESULTS:
            self._uninterrupted += 1
            return
        self._uninterrupted = 0
        wait = DurableWait(operation_ids, loop=self._loop)
        self._open[wait] = None
        self._look_soon()
        try:
            await wait
        finally:
            self._open.pop(wait, None)

    async def _refuse(self) -> None:
        """End code that goes on after the end: by cancellation, by what it cannot know, or by letting it hang."""
        self._refusals += 1
        await asyncio.sleep(0)
        if self._refusals <= REFUSALS_MAX:
            raise asyncio.CancelledError(f"{self.name} has ended")
        if self._refusals <= 2 * REFUSALS_MAX:
            raise InvocationEnded(f"{self.name} has ended")
        await self._loop.create_future()

    # --- for the worker -------------------------------------------------------------------------------------------

    def complete(self, operation_id: str, done: Completion) -> None:
        """An operation has ended. Ignored once the code is leaving: it will find the result when it comes back."""
        if not self.over:
            self.log.end(operation_id, done)
            self._told_waiting = False
            self._look_soon()

    def look(self) -> None:
        """Decide again: the worker is draining, for instance."""
        self._look_soon()

    def evict(self, cause: str, *, blocked_locally: bool = False) -> None:
        """Leave the worker while every branch waits. ``blocked_locally``: not all of them wait for operations, so
        the task is ready again at once."""
        self._close()
        blocked = () if blocked_locally else tuple(wait.operation_ids for wait in self._open)
        self._host.report_eviction(Checkpoint(self.log.take_new(), blocked, self.log.received, cause))

    @property
    def may_be_evicted_for_capacity(self) -> bool:
        waits = self.waiting_since is not None and not self.over
        return waits and self._policy is not None and self._policy.allow_capacity_eviction

    @property
    def eviction_order(self) -> tuple[int, float]:
        """Who goes first: low priority, then long waiting."""
        return (self._policy.priority if self._policy is not None else 0, self.waiting_since or 0.0)

    def finish(self) -> None:
        """The function has returned or failed. What it left open is given up; other tasks of it may go on."""
        self._close()
        for wait in list(self._open):
            wait.cancel()

    async def drop(self) -> None:
        """End the code. It cannot go on by catching the cancellation: everything it asks for is refused."""
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
            logger.warning("code of %s caught %d cancellations and is left behind", self.name, CANCELS_MAX)

    def _close(self) -> None:
        self.over = True
        self._clock.pause()
        if self._look is not None:
            self._look.cancel()
            self._look = None

    # --- deciding -------------------------------------------------------------------------------------------------

    def _look_soon(self) -> None:
        self._look_at(self._loop.call_soon)

    def _look_later(self, delay_s: float) -> None:
        self._look_at(lambda callback, context: self._loop.call_later(delay_s, callback, context=context))

    def _look_at(self, schedule: Callable[..., asyncio.Handle]) -> None:
        if self._look is not None:
            self._look.cancel()
        self._look = None if self.over else schedule(self._decide, context=Context())

    def _decide(self) -> None:
        """Hand over the next result, wait for the code, or leave. Runs after every operation and end of a branch."""
        self._look = None
        state = tree_state(self._tree.live)
        if state is TreeState.RUNNABLE and self._runnable_checks < RUNNABLE_CHECKS_MAX:
            self._runnable_checks += 1
            self._look_soon()
            return
        self._runnable_checks = 0
        first = self._first_deliverable()
        if first is not None and not self._held_back(first[0], state):
            self._deliver(first[1])
        elif not self._open:
            return
        elif state is TreeState.BLOCKED:
            self._all_wait()
        elif state is TreeState.BLOCKED_LOCALLY and self._host.draining:
            self.evict("worker_shutdown", blocked_locally=True)
        else:
            self._some_work()

    def _first_deliverable(self) -> tuple[int, DurableWait] | None:
        """The wait that was over first, if any is, and its rank."""
        ranked = [
            (rank, wait)
            for wait in self._open
            if not wait.done() and (rank := self.log.rank(wait.operation_ids)) is not None
        ]
        return min(ranked, key=lambda pair: pair[0], default=None)

    def _held_back(self, rank: int, state: TreeState) -> bool:
        """On the first pass something else came before, and a branch works that may be on its way to it."""
        if state is TreeState.BLOCKED or not self.log.runs_ahead(rank):
            self._held_since = None
            return False
        if self._held_since is None:
            self._held_since = self._loop.time()
        return self._loop.time() - self._held_since < GAP_PATIENCE_S

    def _deliver(self, wait: DurableWait) -> None:
        self._held_since = None
        self.waiting_since = None
        self._told_waiting = False
        self._clock.resume()
        wait.set_result(None)
        self._look_soon()

    def _some_work(self) -> None:
        """What waits must be armed although the code stays."""
        self.waiting_since = None
        self._clock.resume()
        if self.log.has_news or self._told_waiting:
            self._told_waiting = False
            self._host.record(self.log.take_new(), waiting=False)
        self._look_later(TREE_CHECK_INTERVAL_S)

    def _all_wait(self) -> None:
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
            if left_s is not None and not self.over:
                self._look_later(left_s)

    def _stay_waiting(self) -> None:
        if self.log.has_news or not self._told_waiting:
            self._told_waiting = True
            self._host.record(self.log.take_new(), waiting=True)
        self._host.begins_to_wait()
