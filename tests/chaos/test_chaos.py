"""Everything dies in turn, in an order that a seed decides: every run still ends, once, with the right result.

`deploy/local turmoil` plays more of it, and sets what is read from the environment here.
"""

from __future__ import annotations

import os
import time

import pytest

from acceptance.environment import Environment
from acceptance.stack import Stack
from chaos.audit import Audit
from chaos.fault_injection import FaultInjector
from chaos.load import Load

pytestmark = pytest.mark.real

SEEDS = [int(seed) for seed in os.environ.get("SUBLET_TURMOIL_SEEDS", "1").split(",")]
BLOWS = int(os.environ.get("SUBLET_TURMOIL_BLOWS", "6"))
RUNS = int(os.environ.get("SUBLET_TURMOIL_RUNS", "400"))
"""For each seed, children included."""


@pytest.mark.parametrize("seed", SEEDS)
async def test_every_run_ends_right_whatever_dies(environment: Environment, mended_stack: Stack, seed: int) -> None:
    audit, load = Audit(environment), Load(environment)
    injector = FaultInjector(environment, mended_stack, audit, seed)
    await audit.begin()
    await injector.begin()
    began = time.monotonic()
    try:
        for fault in range(BLOWS + 1):
            await load.add_up_to(RUNS * (fault + 1) // (BLOWS + 1))
            if fault < BLOWS:
                await injector.strike()
        await load.arrive()
        await audit.pass_(load.submitted)
    except BaseException:
        print(*injector.history, *await environment.unfinished(), sep="\n")
        raise
    finally:
        how = ", ".join(f"{count} {how}" for how, count in injector.counts.most_common())
        took_s = time.monotonic() - began
        print(f"\nseed {seed}: {load.submitted.total()} runs under {BLOWS} blows ({how}) in {took_s:.0f} s; {audit}")
