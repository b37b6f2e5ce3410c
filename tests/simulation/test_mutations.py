"""The checkers notice each deliberate mistake within the number of seeds that `MUTATIONS` names."""

from __future__ import annotations

import pytest

from simulation.faults.mutations import MUTATIONS, Mutation
from simulation.scenarios.workloads import draw_plan
from simulation.simulation import simulate


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.__name__)
def test_a_deliberate_mistake_is_noticed(mutation: Mutation) -> None:
    trial = MUTATIONS[mutation]
    with mutation():
        assert any(simulate(draw_plan(seed, trial.kinds)).violations for seed in range(trial.seeds))
