"""The tree of branches: operation ids, positions, and whether every branch waits."""

from __future__ import annotations

import asyncio
import contextvars
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import pytest
import pytest_asyncio

from sublet._durable.quiescence import DurableWait, TreeState, tree_state
from sublet._durable.task_tree import Branch, BranchTask, Tree, current_branch, install

Code = Callable[[], Coroutine[Any, Any, Any]]


class BranchTree:
    """Grows one tree, and cuts it down at the end."""

    def __init__(self) -> None:
        install(asyncio.get_running_loop())
        self.ended = 0
        self.tree = Tree(7, self._on_end)
        self.waits: list[DurableWait] = []

    def _on_end(self) -> None:
        self.ended += 1

    def spawn(self, code: Code) -> BranchTask:
        return self.tree.start(code(), contextvars.copy_context())

    async def durably(self) -> str:
        """Wait as for a durable operation; returns its operation id."""
        branch = current_branch()
        assert branch is not None
        operation_id = branch.next_operation_id()
        wait = DurableWait((operation_id,), loop=asyncio.get_running_loop())
        self.waits.append(wait)
        await wait
        return operation_id

    async def state(self) -> TreeState:
        for _ in range(10):
            await asyncio.sleep(0)
        return tree_state(self.tree.live)

    @property
    def operation_ids(self) -> set[str]:
        return {operation_id for wait in self.waits for operation_id in wait.operation_ids}


@pytest_asyncio.fixture
async def tree() -> AsyncIterator[BranchTree]:
    tree = BranchTree()
    yield tree
    for task in list(tree.tree.live):
        task.cancel()
    await asyncio.gather(*tree.tree.live, return_exceptions=True)


async def test_operation_ids_follow_the_tree_of_branches(tree: BranchTree) -> None:
    async def leaf() -> None:
        await tree.durably()

    async def twig() -> None:
        tree.waits.clear()
        await asyncio.gather(leaf(), tree.durably())

    async def code() -> None:
        branch = current_branch()
        assert branch is not None
        assert [branch.next_operation_id(), branch.next_operation_id()] == ["1", "2"]
        async with asyncio.TaskGroup() as group:
            group.create_task(asyncio.sleep(0))
            group.create_task(twig())

    tree.spawn(code)
    await tree.state()
    assert tree.operation_ids == {"t1.t0.1", "t1.t1.1"}


async def test_tasks_with_an_empty_context_are_not_branches(tree: BranchTree) -> None:
    seen: list[Branch | None] = []

    async def ours() -> None:
        seen.append(current_branch())

    async def code() -> None:
        loop = asyncio.get_running_loop()
        await loop.create_task(ours(), context=contextvars.Context())
        await tree.durably()

    tree.spawn(code)
    await tree.state()
    assert seen == [None]
    assert len(tree.tree.live) == 1


async def test_tasks_outside_of_a_tree_are_plain_asyncio_tasks(tree: BranchTree) -> None:
    task = asyncio.create_task(asyncio.sleep(0))
    await task
    assert not isinstance(task, BranchTask)


async def test_a_task_started_by_a_callback_belongs_to_the_branch_that_added_the_callback(tree: BranchTree) -> None:
    async def code() -> None:
        loop = asyncio.get_running_loop()
        loop.call_soon(lambda: asyncio.ensure_future(tree.durably()))
        await tree.durably()

    tree.spawn(code)
    await tree.state()
    assert tree.operation_ids == {"1", "t0.1"}


async def test_taking_the_result_of_a_branch_advances_the_position(tree: BranchTree) -> None:
    positions: list[int] = []

    async def leg(position: int) -> None:
        branch = current_branch()
        assert branch is not None
        branch.advance_position(position)

    async def code() -> None:
        branch = current_branch()
        assert branch is not None
        background = asyncio.create_task(leg(90))
        await asyncio.gather(leg(20), leg(30))
        positions.append(branch.position)
        await asyncio.create_task(leg(25))
        positions.append(branch.position)
        await background
        positions.append(branch.position)

    await tree.spawn(code)
    assert positions == [30, 30, 90]


async def test_leaving_a_task_group_advances_the_position(tree: BranchTree) -> None:
    positions: list[int] = []

    async def leg(position: int) -> None:
        branch = current_branch()
        assert branch is not None
        branch.advance_position(position)

    async def code() -> None:
        branch = current_branch()
        assert branch is not None
        async with asyncio.TaskGroup() as group:
            group.create_task(leg(20))
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            branch.next_operation_id()
            positions.append(branch.position)
            group.create_task(leg(15))
        branch.next_operation_id()
        positions.append(branch.position)

    await tree.spawn(code)
    assert positions == [7, 20]


# --- state -----------------------------------------------------------------------------------------------------


async def gathered(tree: BranchTree) -> None:
    await asyncio.gather(tree.durably(), tree.durably(), return_exceptions=True)


async def grouped(tree: BranchTree) -> None:
    async with asyncio.TaskGroup() as group:
        group.create_task(tree.durably())
        group.create_task(gathered(tree))


async def awaited(tree: BranchTree) -> None:
    await asyncio.create_task(tree.durably())


async def waited(tree: BranchTree) -> None:
    await asyncio.wait([asyncio.create_task(tree.durably()), asyncio.create_task(awaited(tree))])


async def waited_for_the_first(tree: BranchTree) -> None:
    tasks = [asyncio.create_task(tree.durably()) for _ in range(2)]
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)


async def shielded(tree: BranchTree) -> None:
    await asyncio.shield(asyncio.create_task(tree.durably()))


async def one_by_one(tree: BranchTree) -> None:
    for first in asyncio.as_completed([tree.durably(), tree.durably()]):
        await first


async def gathered_in_part(tree: BranchTree) -> None:
    await asyncio.gather(asyncio.sleep(0), tree.durably())


@pytest.mark.parametrize(
    "code", [gathered, grouped, awaited, waited, waited_for_the_first, shielded, gathered_in_part, one_by_one]
)
async def test_a_tree_is_blocked_when_every_branch_waits_for_an_operation(
    tree: BranchTree, code: Callable[[BranchTree], Coroutine[Any, Any, None]]
) -> None:
    root = tree.spawn(lambda: code(tree))
    assert await tree.state() is TreeState.BLOCKED
    for wait in list(tree.waits):
        wait.set_result(None)
    await root


async def with_a_timeout(tree: BranchTree) -> None:
    async with asyncio.timeout(60):
        await tree.durably()


async def with_wait_for(tree: BranchTree) -> None:
    await asyncio.wait_for(tree.durably(), 60)


async def waiting_with_timeout(tree: BranchTree) -> None:
    await asyncio.wait([asyncio.create_task(tree.durably())], timeout=60)


async def sleeping(tree: BranchTree) -> None:
    await asyncio.gather(tree.durably(), asyncio.sleep(60))


async def for_a_thread(tree: BranchTree) -> None:
    await asyncio.gather(tree.durably(), asyncio.to_thread(time.sleep, 0.5))


async def one_by_one_with_timeout(tree: BranchTree) -> None:
    for first in asyncio.as_completed([tree.durably()], timeout=60):
        await first


async def one_by_one_with_a_stranger(tree: BranchTree) -> None:
    loop = asyncio.get_running_loop()
    stranger = loop.create_task(asyncio.sleep(60), context=contextvars.Context())
    for first in asyncio.as_completed([tree.durably(), stranger]):
        await first


async def for_a_stranger(tree: BranchTree) -> None:
    loop = asyncio.get_running_loop()
    stranger = loop.create_task(asyncio.sleep(60), context=contextvars.Context())
    await asyncio.gather(tree.durably(), stranger)


@pytest.mark.parametrize(
    "code",
    [
        with_a_timeout,
        with_wait_for,
        waiting_with_timeout,
        one_by_one_with_timeout,
        one_by_one_with_a_stranger,
        sleeping,
        for_a_thread,
        for_a_stranger,
    ],
)
async def test_a_branch_that_awaits_something_unknown_is_working(
    tree: BranchTree, code: Callable[[BranchTree], Coroutine[Any, Any, None]]
) -> None:
    tree.spawn(lambda: code(tree))
    assert await tree.state() is TreeState.WORKING


async def for_a_lock(tree: BranchTree) -> None:
    lock = asyncio.Lock()
    await lock.acquire()
    await asyncio.gather(tree.durably(), lock.acquire())


async def for_an_event(tree: BranchTree) -> None:
    await asyncio.gather(tree.durably(), asyncio.Event().wait())


async def for_a_queue(tree: BranchTree) -> None:
    await asyncio.gather(tree.durably(), asyncio.Queue[int]().get())


@pytest.mark.parametrize("code", [for_a_lock, for_an_event, for_a_queue])
async def test_a_branch_that_awaits_a_lock_or_the_like_is_blocked_locally(
    tree: BranchTree, code: Callable[[BranchTree], Coroutine[Any, Any, None]]
) -> None:
    tree.spawn(lambda: code(tree))
    assert await tree.state() is TreeState.BLOCKED_LOCALLY


async def test_an_expired_timeout_does_not_count_as_work(tree: BranchTree) -> None:
    async def code() -> None:
        async with asyncio.timeout(60):
            await asyncio.sleep(0)
        await tree.durably()

    tree.spawn(code)
    assert await tree.state() is TreeState.BLOCKED


async def test_a_branch_that_is_about_to_run_is_runnable(tree: BranchTree) -> None:
    async def code() -> None:
        await asyncio.gather(tree.durably(), tree.durably())

    tree.spawn(code)
    assert tree_state(tree.tree.live) is TreeState.RUNNABLE
    assert await tree.state() is TreeState.BLOCKED
    tree.waits[0].set_result(None)
    assert tree_state(tree.tree.live) is TreeState.RUNNABLE


async def test_on_end_is_called_for_each_branch(tree: BranchTree) -> None:
    async def code() -> None:
        await asyncio.gather(asyncio.sleep(0), asyncio.sleep(0))

    await tree.spawn(code)
    await asyncio.sleep(0)
    assert tree.ended == 3
    assert not tree.tree.live


async def test_a_branch_that_awaits_the_first_result_continues_before_the_next_delivery(tree: BranchTree) -> None:
    went_on: list[bool] = []

    async def code() -> None:
        both = [asyncio.create_task(tree.durably()) for _ in range(2)]
        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        went_on.append(True)
        await tree.durably()

    tree.spawn(code)
    assert await tree.state() is TreeState.BLOCKED
    tree.waits[0].set_result(None)
    while not went_on:
        assert tree_state(tree.tree.live) is TreeState.RUNNABLE
        await asyncio.sleep(0)
