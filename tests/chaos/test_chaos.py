"""Faults hit all processes and servers, in an order that a seed decides: every run completes once, with its result.

`deploy/local chaos` runs more seeds and faults, and sets the environment variables that this module reads.
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

SEEDS = [int(seed) for seed in os.environ.get("SUBLET_CHAOS_SEEDS", "1").split(",")]
FAULTS = int(os.environ.get("SUBLET_CHAOS_FAULTS", "6"))
RUNS = int(os.environ.get("SUBLET_CHAOS_RUNS", "400"))
"""Runs for each seed, children included."""


@pytest.mark.parametrize("seed", SEEDS)
async def test_every_run_completes_in_spite_of_faults(environment: Environment, mended_stack: Stack, seed: int) -> None:
    audit, load = Audit(environment), Load(environment)
    injector = FaultInjector(environment, mended_stack, audit, seed)
    await audit.begin()
    await injector.begin()
    started = time.monotonic()
    try:
        for fault in range(FAULTS + 1):
            await load.add_up_to(RUNS * (fault + 1) // (FAULTS + 1))
            if fault < FAULTS:
                await injector.inject()
        await load.assert_right_results()
        await audit.assert_passed(load.submitted)
    except BaseException:
        print(*injector.history, *await environment.unfinished(), sep="\n")
        raise
    finally:
        how = ", ".join(f"{count} {how}" for how, count in injector.counts.most_common())
        took_s = time.monotonic() - started
        print(f"\nseed {seed}: {load.submitted.total()} runs under {FAULTS} faults ({how}) in {took_s:.0f} s; {audit}")
