"""A few seeds of the simulation; `.ci/run` and ``deploy/local simulate`` run many more."""

from __future__ import annotations

import pytest

from simulation.scenarios.workloads import draw_plan
from simulation.simulation import simulate


@pytest.mark.parametrize("seed", range(20))
def test_all_checks_pass_in_spite_of_faults(seed: int) -> None:
    outcome = simulate(draw_plan(seed))
    assert not outcome.violations, f"deploy/local simulate --shrink {seed}"
    assert outcome.runs


def test_the_same_seed_gives_the_same_digest_and_steps() -> None:
    first, second = simulate(draw_plan(7)), simulate(draw_plan(7))
    assert (first.digest, first.steps) == (second.digest, second.steps)
