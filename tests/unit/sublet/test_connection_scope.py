"""`ConnectionScope`: its end interrupts guarded code, and cancellations by others are kept."""

from __future__ import annotations

import asyncio

import pytest

from sublet._amqp.connection_scope import ConnectionScope, ConnectionScopeClosed


async def for_ever(line: ConnectionScope) -> None:
    with line.held():
        await asyncio.Event().wait()


async def test_a_guarded_wait_ends_when_the_scope_is_closed() -> None:
    line = ConnectionScope()
    waits = [asyncio.create_task(for_ever(line)) for _ in range(3)]
    await asyncio.sleep(0)
    line.close()
    line.close()
    for wait in waits:
        with pytest.raises(ConnectionScopeClosed):
            await wait


async def test_a_closed_scope_refuses_new_guards() -> None:
    line = ConnectionScope()
    line.close()
    with pytest.raises(ConnectionScopeClosed):
        await for_ever(line)


async def test_code_that_left_its_guard_is_not_interrupted() -> None:
    line = ConnectionScope()

    async def passing() -> str:
        with line.held():
            await asyncio.sleep(0)
        await asyncio.sleep(0.01)
        return "done"

    task = asyncio.create_task(passing())
    await asyncio.sleep(0.005)
    line.close()
    assert await task == "done"


async def test_a_cancelled_task_gets_its_cancellation() -> None:
    task = asyncio.create_task(for_ever(ConnectionScope()))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_cancellation_at_the_same_time_as_the_close_wins() -> None:
    for cancel_first in (True, False):
        line = ConnectionScope()
        task = asyncio.create_task(for_ever(line))
        await asyncio.sleep(0)
        for step in (task.cancel, line.close) if cancel_first else (line.close, task.cancel):
            step()
        with pytest.raises(asyncio.CancelledError):
            await task


async def test_a_cancellation_by_the_library_becomes_scope_closed() -> None:
    with pytest.raises(ConnectionScopeClosed), ConnectionScope().held():
        raise asyncio.CancelledError


async def test_other_errors_pass_through_the_guard() -> None:
    with pytest.raises(KeyError), ConnectionScope().held():
        raise KeyError


async def test_after_scope_closed_the_task_can_use_timeouts_again() -> None:
    line = ConnectionScope()

    async def again() -> str:
        with pytest.raises(ConnectionScopeClosed), line.held():
            await asyncio.Event().wait()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await for_ever(ConnectionScope())
        return "fine"

    task = asyncio.create_task(again())
    await asyncio.sleep(0)
    line.close()
    assert await task == "fine"


async def test_code_that_closes_its_own_scope_is_not_interrupted() -> None:
    line = ConnectionScope()
    with line.held():
        line.close()
    await asyncio.sleep(0)
