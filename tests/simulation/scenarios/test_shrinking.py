"""A failing seed is shrunk to the parts that make it fail."""

from __future__ import annotations

from simulation.faults.mutations import lose_the_wake_up_at_the_checkpoint
from simulation.scenarios.shrinking import in_words, shrink, trace
from simulation.scenarios.workloads import draw_plan


def test_a_shrunk_plan_still_fails_and_its_trace_ends_with_the_violation() -> None:
    plan = draw_plan(0)
    with lose_the_wake_up_at_the_checkpoint():
        small, outcome = shrink(plan)
        lines = trace(small)
    assert outcome.violations
    assert len(small.runs) == 1
    assert not small.faults
    assert len(in_words(small)) < len(in_words(plan))
    assert lines[-1].endswith(f"VIOLATION: {outcome.violations[0]}")
    assert any("evicted(" in line for line in lines)
