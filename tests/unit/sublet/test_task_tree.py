"""The tree of asyncio tasks: names, positions, and whether it still works."""

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


class Grove:
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
        """Wait as for a durable operation; returns its node."""
        branch = current_branch()
        assert branch is not None
        operation_id = branch.next_operation_id()
        wait = DurableWait((operation_id,), loop=asyncio.get_running_loop())
        self.waits.append(wait)
        await wait
        return operation_id

    async def standing(self) -> TreeState:
        for _ in range(10):
            await asyncio.sleep(0)
        return tree_state(self.tree.live)

    @property
    def operation_ids(self) -> set[str]:
        return {operation_id for wait in self.waits for operation_id in wait.operation_ids}


@pytest_asyncio.fixture
async def grove() -> AsyncIterator[Grove]:
    grove = Grove()
    yield grove
    for task in list(grove.tree.live):
        task.cancel()
    await asyncio.gather(*grove.tree.live, return_exceptions=True)


async def test_nodes_are_named_by_their_place_in_the_tree(grove: Grove) -> None:
    async def leaf() -> None:
        await grove.durably()

    async def twig() -> None:
        grove.waits.clear()
        await asyncio.gather(leaf(), grove.durably())

    async def code() -> None:
        branch = current_branch()
        assert branch is not None
        assert [branch.next_operation_id(), branch.next_operation_id()] == ["1", "2"]
        async with asyncio.TaskGroup() as group:
            group.create_task(asyncio.sleep(0))
            group.create_task(twig())

    grove.spawn(code)
    await grove.standing()
    assert grove.operation_ids == {"t1.t0.1", "t1.t1.1"}


async def test_tasks_that_are_started_with_an_empty_context_are_no_branches(grove: Grove) -> None:
    seen: list[Branch | None] = []

    async def ours() -> None:
        seen.append(current_branch())

    async def code() -> None:
        loop = asyncio.get_running_loop()
        await loop.create_task(ours(), context=contextvars.Context())
        await grove.durably()

    grove.spawn(code)
    await grove.standing()
    assert seen == [None]
    assert len(grove.tree.live) == 1


async def test_tasks_outside_of_any_tree_are_left_alone(grove: Grove) -> None:
    task = asyncio.create_task(asyncio.sleep(0))
    await task
    assert not isinstance(task, BranchTask)


async def test_a_task_that_a_callback_starts_belongs_to_the_branch_that_asked_for_the_callback(grove: Grove) -> None:
    async def code() -> None:
        loop = asyncio.get_running_loop()
        loop.call_soon(lambda: asyncio.ensure_future(grove.durably()))
        await grove.durably()

    grove.spawn(code)
    await grove.standing()
    assert grove.operation_ids == {"1", "t0.1"}


async def test_who_takes_a_result_has_seen_what_its_branch_saw(grove: Grove) -> None:
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

    await grove.spawn(code)
    assert positions == [30, 30, 90]


async def test_who_leaves_a_task_group_has_seen_what_its_branches_saw(grove: Grove) -> None:
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

    await grove.spawn(code)
    assert positions == [7, 20]


# --- standing -----------------------------------------------------------------------------------------------------


async def gathered(grove: Grove) -> None:
    await asyncio.gather(grove.durably(), grove.durably(), return_exceptions=True)


async def grouped(grove: Grove) -> None:
    async with asyncio.TaskGroup() as group:
        group.create_task(grove.durably())
        group.create_task(gathered(grove))


async def awaited(grove: Grove) -> None:
    await asyncio.create_task(grove.durably())


async def waited(grove: Grove) -> None:
    await asyncio.wait([asyncio.create_task(grove.durably()), asyncio.create_task(awaited(grove))])


async def waited_for_the_first(grove: Grove) -> None:
    tasks = [asyncio.create_task(grove.durably()) for _ in range(2)]
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)


async def shielded(grove: Grove) -> None:
    await asyncio.shield(asyncio.create_task(grove.durably()))


async def one_by_one(grove: Grove) -> None:
    for first in asyncio.as_completed([grove.durably(), grove.durably()]):
        await first


async def gathered_in_part(grove: Grove) -> None:
    await asyncio.gather(asyncio.sleep(0), grove.durably())


@pytest.mark.parametrize(
    "code", [gathered, grouped, awaited, waited, waited_for_the_first, shielded, gathered_in_part, one_by_one]
)
async def test_a_tree_is_blocked_when_every_branch_waits_for_an_operation(
    grove: Grove, code: Callable[[Grove], Coroutine[Any, Any, None]]
) -> None:
    root = grove.spawn(lambda: code(grove))
    assert await grove.standing() is TreeState.BLOCKED
    for wait in list(grove.waits):
        wait.set_result(None)
    await root


async def with_a_timeout(grove: Grove) -> None:
    async with asyncio.timeout(60):
        await grove.durably()


async def with_wait_for(grove: Grove) -> None:
    await asyncio.wait_for(grove.durably(), 60)


async def waiting_with_timeout(grove: Grove) -> None:
    await asyncio.wait([asyncio.create_task(grove.durably())], timeout=60)


async def sleeping(grove: Grove) -> None:
    await asyncio.gather(grove.durably(), asyncio.sleep(60))


async def for_a_thread(grove: Grove) -> None:
    await asyncio.gather(grove.durably(), asyncio.to_thread(time.sleep, 0.5))


async def one_by_one_with_timeout(grove: Grove) -> None:
    for first in asyncio.as_completed([grove.durably()], timeout=60):
        await first


async def one_by_one_with_a_stranger(grove: Grove) -> None:
    loop = asyncio.get_running_loop()
    stranger = loop.create_task(asyncio.sleep(60), context=contextvars.Context())
    for first in asyncio.as_completed([grove.durably(), stranger]):
        await first


async def for_a_stranger(grove: Grove) -> None:
    loop = asyncio.get_running_loop()
    stranger = loop.create_task(asyncio.sleep(60), context=contextvars.Context())
    await asyncio.gather(grove.durably(), stranger)


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
async def test_anything_that_may_go_on_by_itself_counts_as_work(
    grove: Grove, code: Callable[[Grove], Coroutine[Any, Any, None]]
) -> None:
    grove.spawn(lambda: code(grove))
    assert await grove.standing() is TreeState.WORKING


async def for_a_lock(grove: Grove) -> None:
    lock = asyncio.Lock()
    await lock.acquire()
    await asyncio.gather(grove.durably(), lock.acquire())


async def for_an_event(grove: Grove) -> None:
    await asyncio.gather(grove.durably(), asyncio.Event().wait())


async def for_a_queue(grove: Grove) -> None:
    await asyncio.gather(grove.durably(), asyncio.Queue[int]().get())


@pytest.mark.parametrize("code", [for_a_lock, for_an_event, for_a_queue])
async def test_a_branch_that_waits_for_something_of_this_process_is_parked(
    grove: Grove, code: Callable[[Grove], Coroutine[Any, Any, None]]
) -> None:
    grove.spawn(lambda: code(grove))
    assert await grove.standing() is TreeState.BLOCKED_LOCALLY


async def test_a_timeout_that_is_over_does_not_count(grove: Grove) -> None:
    async def code() -> None:
        async with asyncio.timeout(60):
            await asyncio.sleep(0)
        await grove.durably()

    grove.spawn(code)
    assert await grove.standing() is TreeState.BLOCKED


async def test_a_branch_that_is_about_to_run_is_runnable(grove: Grove) -> None:
    async def code() -> None:
        await asyncio.gather(grove.durably(), grove.durably())

    grove.spawn(code)
    assert tree_state(grove.tree.live) is TreeState.RUNNABLE
    assert await grove.standing() is TreeState.BLOCKED
    grove.waits[0].set_result(None)
    assert tree_state(grove.tree.live) is TreeState.RUNNABLE


async def test_the_end_of_each_branch_is_told(grove: Grove) -> None:
    async def code() -> None:
        await asyncio.gather(asyncio.sleep(0), asyncio.sleep(0))

    await grove.spawn(code)
    await asyncio.sleep(0)
    assert grove.ended == 3
    assert not grove.tree.live


async def test_who_waits_for_the_first_of_several_goes_on_before_the_next_is_given_out(grove: Grove) -> None:
    went_on: list[bool] = []

    async def code() -> None:
        both = [asyncio.create_task(grove.durably()) for _ in range(2)]
        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        went_on.append(True)
        await grove.durably()

    grove.spawn(code)
    assert await grove.standing() is TreeState.BLOCKED
    grove.waits[0].set_result(None)
    while not went_on:
        assert tree_state(grove.tree.live) is TreeState.RUNNABLE
        await asyncio.sleep(0)
