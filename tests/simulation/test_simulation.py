"""A few seeds of the simulation with every test run; `.ci/run` and ``deploy/local simulate`` run many more."""

from __future__ import annotations

import pytest

from simulation.scenarios.workloads import draw_plan
from simulation.simulation import simulate


@pytest.mark.parametrize("seed", range(20))
def test_every_promise_holds_whatever_dies(seed: int) -> None:
    outcome = simulate(draw_plan(seed))
    assert not outcome.violations, f"deploy/local simulate --shrink {seed}"
    assert outcome.runs


def test_the_same_seed_gives_the_same_simulation_to_the_last_step() -> None:
    first, second = simulate(draw_plan(7)), simulate(draw_plan(7))
    assert (first.digest, first.steps) == (second.digest, second.steps)
