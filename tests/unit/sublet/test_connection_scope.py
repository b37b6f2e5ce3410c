"""Lifelines: who holds one is told when it is cut, and nobody else's cancellation is swallowed."""

from __future__ import annotations

import asyncio

import pytest

from sublet._amqp.connection_scope import ConnectionScope, ConnectionScopeClosed


async def for_ever(line: ConnectionScope) -> None:
    with line.held():
        await asyncio.Event().wait()


async def test_a_wait_ends_when_the_line_is_cut() -> None:
    line = ConnectionScope()
    waits = [asyncio.create_task(for_ever(line)) for _ in range(3)]
    await asyncio.sleep(0)
    line.close()
    line.close()
    for wait in waits:
        with pytest.raises(ConnectionScopeClosed):
            await wait


async def test_a_line_that_was_cut_cannot_be_held() -> None:
    line = ConnectionScope()
    line.close()
    with pytest.raises(ConnectionScopeClosed):
        await for_ever(line)


async def test_who_has_left_is_not_disturbed() -> None:
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


async def test_a_cancelled_task_is_cancelled() -> None:
    task = asyncio.create_task(for_ever(ConnectionScope()))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_task_that_is_cancelled_and_cut_off_at_once_is_cancelled() -> None:
    for cancel_first in (True, False):
        line = ConnectionScope()
        task = asyncio.create_task(for_ever(line))
        await asyncio.sleep(0)
        for step in (task.cancel, line.close) if cancel_first else (line.close, task.cancel):
            step()
        with pytest.raises(asyncio.CancelledError):
            await task


async def test_a_stray_cancellation_from_inside_is_an_error() -> None:
    with pytest.raises(ConnectionScopeClosed), ConnectionScope().held():
        raise asyncio.CancelledError


async def test_other_errors_pass() -> None:
    with pytest.raises(KeyError), ConnectionScope().held():
        raise KeyError


async def test_after_a_cut_the_task_can_wait_again_and_time_out_as_ever() -> None:
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


async def test_who_cuts_the_line_that_it_holds_goes_on() -> None:
    line = ConnectionScope()
    with line.held():
        line.close()
    await asyncio.sleep(0)
