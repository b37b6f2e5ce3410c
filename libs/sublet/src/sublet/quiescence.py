"""Does a tree of asyncio tasks still work, or does every branch of it wait for a durable operation?

The answer comes from what each asyncio task is suspended on. Only what is known to end with a durable operation
counts as waiting; anything else (I/O, a lock, a timer, a thread) counts as work, so work is never thrown away.
"""

from __future__ import annotations

import asyncio
from asyncio import tasks as asyncio_tasks
from collections.abc import Collection, Iterable
from enum import IntEnum
from typing import Any

from sublet.branches import BranchTask


class Standing(IntEnum):
    """How far something is from going on. Of several together, the greatest counts."""

    BLOCKED = 0
    """Only the end of a durable operation can move it."""
    WORKING = 1
    """Suspended on something that is not ours."""
    RUNNABLE = 2
    """About to run."""


class DurableWait(asyncio.Future[None]):
    """What a branch is suspended on while the operations at ``nodes`` are open. It needs all of them."""

    def __init__(self, nodes: tuple[str, ...], *, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(loop=loop)
        self.nodes = nodes


def standing_of(live: Collection[BranchTask]) -> Standing:
    """How the tree of these unfinished tasks stands."""
    worst = Standing.BLOCKED
    for task in live:
        if not task.done():
            worst = max(worst, _standing_of_task(task, live))
    if worst is Standing.BLOCKED and _has_timer(live):
        return Standing.WORKING
    return worst


def _standing_of_task(task: BranchTask, live: Collection[BranchTask]) -> Standing:
    waiter = task._fut_waiter  # type: ignore[attr-defined]
    if waiter is None or waiter.done():
        return Standing.RUNNABLE
    standing = _standing_of_future(waiter, live)
    if standing is not Standing.WORKING:
        return standing
    awaited = _awaited_in_code(task)
    return Standing.WORKING if awaited is None else _standing_of_all(awaited, live)


def _standing_of_future(future: asyncio.Future[Any], live: Collection[BranchTask]) -> Standing:
    if isinstance(future, DurableWait):
        return Standing.BLOCKED
    if isinstance(future, BranchTask):
        # Whether that task is blocked is asked for itself: it is in ``live`` too.
        return Standing.BLOCKED if future in live else Standing.WORKING
    children = getattr(future, "_children", None)  # asyncio.gather
    if children is not None:
        return _standing_of_all(children, live)
    shielded = _shielded(future)
    return Standing.WORKING if shielded is None else _standing_of_all([shielded], live)


def _standing_of_all(futures: Iterable[asyncio.Future[Any]], live: Collection[BranchTask]) -> Standing:
    """Of something that waits for these. All of them done: the callback that ends the wait is about to run."""
    undone = [future for future in futures if not future.done()]
    if not undone:
        return Standing.RUNNABLE
    return max(_standing_of_future(future, live) for future in undone)


def _shielded(future: asyncio.Future[Any]) -> asyncio.Future[Any] | None:
    """What an outer future of asyncio.shield protects."""
    for callback, _ in getattr(future, "_callbacks", None) or ():
        if getattr(callback, "__qualname__", "") == "shield.<locals>._outer_done_callback":
            cells = dict(zip(callback.__code__.co_freevars, callback.__closure__, strict=True))
            inner: asyncio.Future[Any] = cells["inner"].cell_contents
            return inner
    return None


_TASK_GROUP_EXITS = {
    getattr(asyncio.TaskGroup, name).__code__ for name in ("__aexit__", "_aexit") if hasattr(asyncio.TaskGroup, name)
}
_WAIT = asyncio_tasks._wait.__code__  # type: ignore[attr-defined]


def _awaited_in_code(task: BranchTask) -> Iterable[asyncio.Future[Any]] | None:
    """What ``TaskGroup`` and ``asyncio.wait`` (without timeout) wait for, which is only in their local variables."""
    coro: Any = task.get_coro()
    while getattr(coro, "cr_await", None) is not None and hasattr(coro.cr_await, "cr_await"):
        coro = coro.cr_await
    frame = getattr(coro, "cr_frame", None)
    if frame is None:
        return None
    if frame.f_code in _TASK_GROUP_EXITS:
        group: Iterable[asyncio.Future[Any]] = frame.f_locals["self"]._tasks
        return group
    if frame.f_code is _WAIT and frame.f_locals["timeout"] is None:
        waited: Iterable[asyncio.Future[Any]] = frame.f_locals["fs"]
        return waited
    return None


def _has_timer(live: Collection[BranchTask]) -> bool:
    """A timeout (of asyncio, anyio or async_timeout) is about to interrupt one of the tasks."""
    loop = asyncio.get_running_loop()
    for handle in getattr(loop, "_scheduled", ()):
        owner = getattr(handle._callback, "__self__", None)
        if owner is None or handle.cancelled():
            continue
        interrupted = getattr(owner, "_task", None) or getattr(owner, "_host_task", None)
        if interrupted in live:
            return True
    return False
