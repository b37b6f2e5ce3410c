"""Decides whether every branch of a durable task waits for a durable operation, so that the task can be evicted.

The decision depends on what each asyncio task awaits. Only awaitables that are known to end with a durable operation
count as waiting. Anything else (I/O, a timer, a thread) counts as work, so that no work is lost by an eviction.
"""

from __future__ import annotations

import asyncio
from asyncio import tasks as asyncio_tasks
from collections.abc import Collection, Iterable
from enum import IntEnum
from types import FrameType
from typing import Any

from sublet._durable.task_tree import BranchTask


class TreeState(IntEnum):
    """What a branch does. The state of a tree is the greatest one of its branches."""

    BLOCKED = 0
    """Awaits a durable operation, directly or through other branches."""
    BLOCKED_LOCALLY = 1
    """Awaits a lock, an event, a queue or the like. Another branch can release it."""
    WORKING = 2
    """Awaits something unknown: I/O, a timer, a thread."""
    RUNNABLE = 3
    """Will run in the next rounds of the event loop."""


class DurableWait(asyncio.Future[None]):
    """What a branch awaits until all operations with these ids have ended."""

    def __init__(self, operation_ids: tuple[str, ...], *, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(loop=loop)
        self.operation_ids = operation_ids


def tree_state(live: Collection[BranchTask]) -> TreeState:
    """The state of the tree with these unfinished tasks."""
    worst = TreeState.BLOCKED
    for task in live:
        # The callbacks of an ended task will run next. One ended task may be enough for a branch that awaits several.
        worst = max(worst, TreeState.RUNNABLE if task.done() else _state_of_task(task, live))
    if worst < TreeState.WORKING and _has_timer(live):
        return TreeState.WORKING
    return worst


def _state_of_task(task: BranchTask, live: Collection[BranchTask]) -> TreeState:
    waiter = task._fut_waiter  # type: ignore[attr-defined]
    if waiter is None or waiter.done():
        return TreeState.RUNNABLE
    state = _state_of_future(waiter, live)
    return _state_by_code(task, live) if state is TreeState.WORKING else state


def _state_of_future(future: asyncio.Future[Any], live: Collection[BranchTask]) -> TreeState:
    if isinstance(future, DurableWait):
        return TreeState.BLOCKED
    if isinstance(future, BranchTask):
        # The state of that task is determined separately: it is in ``live`` too.
        return TreeState.BLOCKED if future in live else TreeState.WORKING
    children = getattr(future, "_children", None)  # asyncio.gather
    if children is not None:
        return _state_of_all(children, live)
    shielded = _shielded(future)
    return TreeState.WORKING if shielded is None else _state_of_all([shielded], live)


def _state_of_all(futures: Iterable[asyncio.Future[Any]], live: Collection[BranchTask]) -> TreeState:
    """The state of a future that awaits these. If all are done, the callback that ends the wait will run next."""
    undone = [future for future in futures if not future.done()]
    if not undone:
        return TreeState.RUNNABLE
    return max(_state_of_future(future, live) for future in undone)


def _shielded(future: asyncio.Future[Any]) -> asyncio.Future[Any] | None:
    """The inner future of a future made by ``asyncio.shield``; None for other futures."""
    for callback, _ in getattr(future, "_callbacks", None) or ():
        if getattr(callback, "__qualname__", "") == "shield.<locals>._outer_done_callback":
            inner: asyncio.Future[Any] = _closure(callback)["inner"]
            return inner
    return None


_TASK_GROUP_EXITS = {
    getattr(asyncio.TaskGroup, name).__code__ for name in ("__aexit__", "_aexit") if hasattr(asyncio.TaskGroup, name)
}
_WAIT = asyncio_tasks._wait.__code__  # type: ignore[attr-defined]
_BLOCKING_LOCALLY = {
    method.__code__
    for method in (
        asyncio.Lock.acquire,
        asyncio.Semaphore.acquire,
        asyncio.Event.wait,
        asyncio.Condition.wait,
        asyncio.Queue.get,
        asyncio.Queue.put,
    )
}


def _state_by_code(task: BranchTask, live: Collection[BranchTask]) -> TreeState:
    """The state of a task that awaits a plain future, by the code that awaits it."""
    frames = _innermost_frames(task)
    if not frames:
        return TreeState.WORKING
    code, variables = frames[0].f_code, frames[0].f_locals
    if code in _TASK_GROUP_EXITS:
        return _state_of_all(variables["self"]._tasks, live)
    if code is _WAIT and variables["timeout"] is None:
        return _state_of_all(variables["fs"], live)
    if code not in _BLOCKING_LOCALLY:
        return TreeState.WORKING
    if len(frames) > 1 and frames[1].f_code.co_qualname in _ONE_BY_ONE:
        return _state_of_the_first(frames[1].f_locals, live)
    return TreeState.BLOCKED_LOCALLY


def _innermost_frames(task: BranchTask) -> list[FrameType]:
    """The frame that awaits the future, and its caller. Empty if the code is not made of plain coroutines."""
    frames: list[FrameType] = []
    coro: Any = task.get_coro()
    while hasattr(coro, "cr_await"):
        frames = [coro.cr_frame, *frames[:1]]
        coro = coro.cr_await
    return frames if type(coro).__name__ == "FutureIter" else []


_ONE_BY_ONE = {"as_completed.<locals>._wait_for_one", "_AsCompletedIterator._wait_for_one"}
"""Code that awaits a result of ``asyncio.as_completed``: before Python 3.13, and since then."""


def _state_of_the_first(variables: dict[str, Any], live: Collection[BranchTask]) -> TreeState:
    """The state of a task that awaits a result of ``asyncio.as_completed``; ``variables`` are those of that code."""
    if "self" in variables:
        todo, timeout = variables["self"]._todo, variables["self"]._timeout_handle
    else:
        feeder = _feeder(variables["done"], live)
        if feeder is None:
            return TreeState.WORKING
        todo, timeout = feeder["todo"], feeder["timeout_handle"]
    return TreeState.WORKING if timeout is not None else _state_of_all(todo, live)


def _feeder(queue: asyncio.Queue[Any], live: Collection[BranchTask]) -> dict[str, Any] | None:
    """The variables of the callback that puts tasks into this queue when they are done."""
    callbacks = (callback for task in live for callback, _ in task._callbacks or ())
    for callback in callbacks:
        if getattr(callback, "__qualname__", "") == "as_completed.<locals>._on_completion":
            variables = _closure(callback)
            if variables["done"] is queue:
                return variables
    return None


def _closure(function: Any) -> dict[str, Any]:
    """The variables of the enclosing function that a function uses."""
    cells = zip(function.__code__.co_freevars, function.__closure__, strict=True)
    return {name: cell.cell_contents for name, cell in cells}


def _has_timer(live: Collection[BranchTask]) -> bool:
    """A timeout (of asyncio, anyio or async_timeout) is set for one of the tasks."""
    loop = asyncio.get_running_loop()
    for handle in getattr(loop, "_scheduled", ()):
        owner = getattr(handle._callback, "__self__", None)
        if owner is None or handle.cancelled():
            continue
        interrupted = getattr(owner, "_task", None) or getattr(owner, "_host_task", None)
        if interrupted in live:
            return True
    return False
