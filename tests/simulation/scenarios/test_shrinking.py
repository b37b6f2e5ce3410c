"""A seed that fails is cut down to what it fails by."""

from __future__ import annotations

from simulation.faults.mutations import lose_the_wake_up_at_the_checkpoint
from simulation.scenarios.shrinking import in_words, shrink, trace
from simulation.scenarios.workloads import draw_plan


def test_what_is_left_of_a_failing_seed_still_fails_and_can_be_read() -> None:
    plan = draw_plan(0)
    with lose_the_wake_up_at_the_checkpoint():
        small, outcome = shrink(plan)
        told = trace(small)
    assert outcome.violations
    assert len(small.runs) == 1
    assert not small.faults
    assert len(in_words(small)) < len(in_words(plan))
    assert told[-1].endswith(f"VIOLATION: {outcome.violations[0]}")
    assert any("Evicted" in line for line in told)
