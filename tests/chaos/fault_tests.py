"""One fault under load, and the audit after it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from acceptance.environment import Environment
from chaos.audit import Audit
from chaos.load import WORKFLOWS, Load


async def assert_load_survives(environment: Environment, target: str, fault: Callable[[], None]) -> None:
    """Inject a fault while runs of all workflows are active, and start others after it. All must complete once, with
    the right results. ``target``: what the fault affects, as `Audit` names it."""
    audit, load = Audit(environment), Load(environment)
    await audit.begin()
    await asyncio.gather(*(environment.worker(*WORKFLOWS, slots=8, durable_slots=8) for _ in range(2)))
    await load.add()
    await environment.until_written("started", 5)
    audit.fault_follows(target)
    await asyncio.to_thread(fault)
    await load.add()
    try:
        await load.assert_right_results()
        await audit.assert_passed(load.submitted)
    except BaseException:
        print(*await environment.unfinished(), sep="\n")
        raise
