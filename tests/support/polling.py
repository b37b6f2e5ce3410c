"""Waiting for a condition, without an assumption about its duration."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable

TIMEOUT_S = 20.0
QUIET_S = 0.2


async def until(condition: Callable[[], object | Awaitable[object]], what: str = "the condition") -> None:
    """Wait until the condition holds. Fail after `TIMEOUT_S`."""
    try:
        async with asyncio.timeout(TIMEOUT_S):
            while not await _holds(condition):  # noqa: ASYNC110 - any condition, not only those that can tell
                await asyncio.sleep(0.01)
    except TimeoutError:
        raise AssertionError(f"{what} did not come true within {TIMEOUT_S:g} s") from None


async def _holds(condition: Callable[[], object | Awaitable[object]]) -> bool:
    value = condition()
    return bool(await value if inspect.isawaitable(value) else value)


async def short_delay() -> None:
    """Wait long enough for an event that must not happen."""
    await asyncio.sleep(QUIET_S)
