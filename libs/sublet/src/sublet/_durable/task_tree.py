"""The tree of asyncio tasks that a durable function starts. Each task of it is a branch with its own name.

``t1`` is the second asyncio task that the function itself started, ``t1.t0`` the first one that ``t1`` started.
Operations are numbered within their branch, so their ids do not depend on how branches interleave.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Generator
from contextvars import Context, ContextVar, copy_context
from typing import Any

_branch: ContextVar[Branch | None] = ContextVar("sublet_branch", default=None)


class Branch:
    """One branch of a durable task.

    Attributes:
        position: the branch has seen everything up to this position in the order of all events. It advances with the
            results of its operations, of branches whose results it takes, and of task groups that it leaves.
    """

    __slots__ = ("_branches", "_groups", "_operations", "name", "parent", "position", "tree")

    def __init__(self, name: str, tree: Tree, position: int, parent: Branch | None = None) -> None:
        self.name = name
        self.tree = tree
        self.position = position
        self.parent = parent
        self._operations = 0
        self._branches = 0
        self._groups: list[tuple[asyncio.TaskGroup, int]] = []

    def next_operation_id(self) -> str:
        """The operation id of the next operation of this branch."""
        self._leave_groups()
        self._operations += 1
        return self._within(str(self._operations))

    def fork(self) -> Branch:
        """The branch of the next asyncio task that this one starts."""
        self._leave_groups()
        name = self._within(f"t{self._branches}")
        self._branches += 1
        return Branch(name, self.tree, self.position, self)

    def advance_position(self, position: int) -> None:
        """The branch has now seen everything up to ``position``."""
        self.position = max(self.position, position)

    def ended_in(self, group: asyncio.TaskGroup, position: int) -> None:
        """A branch that this one started in a task group has ended. Its position counts when the group is left."""
        self._groups.append((group, position))

    def _leave_groups(self) -> None:
        for group, position in self._groups:
            if _is_left(group):
                self.advance_position(position)
        self._groups = [ended for ended in self._groups if not _is_left(ended[0])]

    def _within(self, name: str) -> str:
        return f"{self.name}.{name}" if self.name else name


def _is_left(group: Any) -> bool:
    return group._exiting and not group._tasks


class BranchTask(asyncio.Task[Any]):
    """An asyncio task that is a branch of a tree."""

    def __init__(self, coro: Coroutine[Any, Any, Any], branch: Branch, **options: Any) -> None:
        self.branch = branch
        self.group: asyncio.TaskGroup | None = None
        super().__init__(coro, **options)

    def __await__(self) -> Generator[Any, None, Any]:
        result = yield from super().__await__()
        self._propagate_position()
        return result

    def result(self) -> Any:
        result = super().result()
        self._propagate_position()
        return result

    def add_done_callback(self, fn: Callable[..., object], /, *, context: Context | None = None) -> None:
        group = getattr(fn, "__self__", None)
        if isinstance(group, asyncio.TaskGroup):
            self.group = group
        super().add_done_callback(fn, context=context or copy_context())

    def _propagate_position(self) -> None:
        taker = current_branch()
        if taker is not None and taker.tree is self.branch.tree:
            taker.advance_position(self.branch.position)


class Tree:
    """All branches of one invocation. ``on_end`` is called whenever a branch has ended."""

    def __init__(self, position: int, on_end: Callable[[], None]) -> None:
        self._root = Branch("", self, position)
        self._on_end = on_end
        self.live: dict[BranchTask, None] = {}
        """Branches that have not ended, in the order of their start."""
        self.abandoned = False
        """The results of the tasks are not used any more, so their exceptions are not reported."""

    def start(self, coro: Coroutine[Any, Any, Any], context: Context) -> BranchTask:
        """Run the durable function itself."""
        return self._spawn(coro, self._root, asyncio.get_running_loop(), context)

    def spawn(
        self, coro: Coroutine[Any, Any, Any], parent: Branch, loop: asyncio.AbstractEventLoop, **options: Any
    ) -> BranchTask:
        """Start an asyncio task as a branch of ``parent``."""
        context = options.pop("context", None) or copy_context()
        return self._spawn(coro, parent.fork(), loop, context, **options)

    def _spawn(
        self,
        coro: Coroutine[Any, Any, Any],
        branch: Branch,
        loop: asyncio.AbstractEventLoop,
        context: Context,
        **options: Any,
    ) -> BranchTask:
        context.run(_branch.set, branch)
        task = BranchTask(coro, branch, loop=loop, context=context, **options)
        self.live[task] = None
        task.add_done_callback(self._ended, context=Context())
        return task

    def _ended(self, task: asyncio.Task[Any]) -> None:
        assert isinstance(task, BranchTask)
        self.live.pop(task, None)
        branch = task.branch
        if task.group is not None and branch.parent is not None:
            branch.parent.ended_in(task.group, branch.position)
        if self.abandoned and not task.cancelled():
            task.exception()
        self._on_end()


def current_branch() -> Branch | None:
    """The branch that runs this code; None outside of durable tasks."""
    try:
        task = asyncio.current_task()
    except RuntimeError:  # a thread without a loop
        task = None
    return task.branch if isinstance(task, BranchTask) else _branch.get()


def install(loop: asyncio.AbstractEventLoop) -> None:
    """Make every asyncio task that a branch starts on this loop a branch too.

    A task that is started with another context belongs to the branch of that context. Background tasks of the SDK run
    in an empty context, so they never count as code of the user.
    """
    previous = loop.get_task_factory()
    if isinstance(previous, _TaskFactory):
        return
    factory: Any = _TaskFactory(previous)
    loop.set_task_factory(factory)


class _TaskFactory:
    def __init__(self, previous: Any) -> None:
        self._previous = previous

    def __call__(
        self, loop: asyncio.AbstractEventLoop, coro: Coroutine[Any, Any, Any], **options: Any
    ) -> asyncio.Task[Any]:
        context: Context | None = options.get("context")
        parent = context.get(_branch) if context is not None else _branch.get()
        if parent is not None:
            return parent.tree.spawn(coro, parent, loop, **options)
        if self._previous is not None:
            task: asyncio.Task[Any] = self._previous(loop, coro, **options)
            return task
        return asyncio.Task(coro, loop=loop, **options)
