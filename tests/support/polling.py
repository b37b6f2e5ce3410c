"""Waiting for what must come true, without guessing how long that takes."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable

PATIENCE_S = 20.0
QUIET_S = 0.2


async def until(condition: Callable[[], object | Awaitable[object]], what: str = "the condition") -> None:
    """Returns as soon as the condition holds; fails after `PATIENCE_S`."""
    try:
        async with asyncio.timeout(PATIENCE_S):
            while not await _holds(condition):  # noqa: ASYNC110 - any condition, not only those that can tell
                await asyncio.sleep(0.01)
    except TimeoutError:
        raise AssertionError(f"{what} did not come true within {PATIENCE_S:g} s") from None


async def _holds(condition: Callable[[], object | Awaitable[object]]) -> bool:
    value = condition()
    return bool(await value if inspect.isawaitable(value) else value)


async def a_while() -> None:
    """Long enough for what must not happen to happen, were it to."""
    await asyncio.sleep(QUIET_S)
