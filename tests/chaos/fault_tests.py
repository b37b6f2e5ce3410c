"""One blow under load, and the audit after it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from acceptance.environment import Environment
from chaos.audit import Audit
from chaos.load import WORKFLOWS, Load


async def assert_load_survives(environment: Environment, struck: str, fault: Callable[[], None]) -> None:
    """Runs of every sort are under way when it happens, and others come after it. All of them end, once, right."""
    audit, load = Audit(environment), Load(environment)
    await audit.begin()
    await asyncio.gather(*(environment.worker(*WORKFLOWS, slots=8, durable_slots=8) for _ in range(2)))
    await load.add()
    await environment.until_written("started", 5)
    audit.struck(struck)
    await asyncio.to_thread(fault)
    await load.add()
    try:
        await load.arrive()
        await audit.pass_(load.submitted)
    except BaseException:
        print(*await environment.unfinished(), sep="\n")
        raise
