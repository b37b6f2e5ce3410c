"""A second failure begins before the first has ended; and each worker that takes over fails like the one before."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from simulation.faults.failures import FAILURES, Failure
from simulation.scenarios.scenario import Scenario, Trigger, run_scenario
from simulation.scenarios.test_fault_points import (
    ORDINARY,
    RELEASED,
    REPLAYED,
    RESIDENT,
    FaultPoint,
    Kind,
    nothing_started_after_the_end,
    use_every_slot,
)
from simulation.system.simulated_system import ProcessRole
from sublet_protocol import limits
from sublet_protocol.messages import Grant

SECOND_AFTER_S = 0.8

FIRST = (
    "its worker loses its connection briefly",
    "its worker loses its connection for long",
    "the broker restarts",
    "the broker times out the delivery of its ticket",
    "its worker is asked to stop",
    "its worker freezes briefly",
    "its worker freezes until its connection is gone",
    "its worker hangs for long",
    "its scheduler is killed",
)
SECOND = (
    "its worker is killed",
    "its worker loses its connection briefly",
    "its worker loses its connection for long",
    "the broker restarts",
    "the broker times out the delivery of its ticket",
    "its worker is asked to stop",
    "its worker freezes briefly",
    "it is cancelled",
)
FAULT_POINTS = (
    (ORDINARY, "while it runs"),
    (RELEASED, "while it continues without a slot"),
    (RESIDENT, "while it waits"),
    (REPLAYED, "while it runs"),
)


OVERLAPPING = (
    {"its worker loses its connection briefly", "its worker loses its connection for long", "the broker restarts"},
    {
        "its worker freezes briefly",
        "its worker freezes until its connection is gone",
        "its worker hangs for long",
    },
)
"""Failures of which one would end the other too early."""


def named(text: str) -> Failure:
    return next(failure for failure in FAILURES if failure.text == text)


def point_of(kind: Kind, text: str) -> FaultPoint:
    return next(point for point in kind.points if point.text == text)


def pairs() -> Iterator[object]:
    for kind, when in FAULT_POINTS:
        for first in FIRST:
            for second in SECOND:
                if first != second and any({first, second} <= group for group in OVERLAPPING):
                    continue
                yield pytest.param(
                    kind, point_of(kind, when), named(first), named(second), id=f"{kind.text}: {first}, then {second}"
                )


@pytest.mark.parametrize(("kind", "point", "first", "second"), list(pairs()))
def test_a_second_failure_costs_at_most_one_more_start(
    kind: Kind, point: FaultPoint, first: Failure, second: Failure
) -> None:
    async def script(scenario: Scenario) -> None:
        def begin(role: ProcessRole) -> None:
            first.begin(scenario, role)
            scenario.run_in_background(later(role))

        async def later(role: ProcessRole) -> None:
            await asyncio.sleep(SECOND_AFTER_S)
            if not role.process.gone or second.impact in ("none", "cancelled"):
                second.begin(scenario, role)

        scenario.at(point.trigger, begin)
        scenario.start(kind.workflow, kind.steps)
        await scenario.wait_for_end()
        await asyncio.sleep(2 * limits.TICKET_RETAINED_S)
        use_every_slot(scenario)

    result = run_scenario(script, workers=3)
    if second.impact == "cancelled":
        assert result.run.status == "CANCELLED"
        assert nothing_started_after_the_end(result)
    else:
        assert result.run.status == "COMPLETED"
        costs = {first.impact, second.impact}.intersection(point.costs)
        least = costs - {"stops"}  # the wait may end before the worker that stops has evicted the task
        assert kind.bodies + bool(least) <= result.bodies <= kind.bodies + bool(costs)


HARMFUL = (
    "its worker is killed",
    "its worker's machine loses power",
    "its worker loses its connection for long",
    "its worker is asked to stop twice",
    "its worker freezes until its connection is gone",
    "its worker hangs for long",
)


@pytest.mark.parametrize("failure", [named(text) for text in HARMFUL], ids=HARMFUL)
@pytest.mark.parametrize(
    ("workflow", "steps"),
    [
        pytest.param("task", [["work", 3.0]], id="an ordinary task"),
        pytest.param("task", [["release"], ["work", 3.0]], id="a task that released its slot"),
        pytest.param("resident", [["memo"], ["sleep", 0.5], ["work", 3.0]], id="a durable task that keeps its slot"),
        pytest.param("evictable", [["memo"], ["release"], ["work", 3.0]], id="a durable task that released its slot"),
    ],
)
def test_three_workers_fail_in_the_same_way_and_the_fourth_completes_the_run(
    workflow: str, steps: list[list[object]], failure: Failure
) -> None:
    """Each failure begins one second after the grant."""

    async def script(scenario: Scenario) -> None:
        for nth in (1, 2, 3):
            scenario.at(Trigger("received", Grant, nth, then_s=1.0), lambda role: failure.begin(scenario, role))
        scenario.start(workflow, steps)
        await scenario.wait_for_end()
        await asyncio.sleep(2 * limits.TICKET_RETAINED_S)
        use_every_slot(scenario)

    result = run_scenario(script, workers=4)
    assert result.run.status == "COMPLETED"
    assert result.bodies == 4
    assert result.task.retries_used == 0, "a lost worker uses no retry"
