"""One blow under load, and the audit after it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from acceptance.environment import Lab
from chaos.audit import Audit
from chaos.load import WORKFLOWS, Load


async def everything_goes_on(lab: Lab, struck: str, blow: Callable[[], None]) -> None:
    """Runs of every sort are under way when it happens, and others come after it. All of them end, once, right."""
    audit, load = Audit(lab), Load(lab)
    await audit.begin()
    await asyncio.gather(*(lab.worker(*WORKFLOWS, slots=8, durable_slots=8) for _ in range(2)))
    await load.add()
    await lab.until_written("embarked", 5)
    audit.struck(struck)
    await asyncio.to_thread(blow)
    await load.add()
    try:
        await load.arrive()
        await audit.pass_(load.submitted)
    except BaseException:
        print(*await lab.unfinished(), sep="\n")
        raise
