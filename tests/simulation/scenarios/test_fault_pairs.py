"""A second trouble comes while the first is not over yet; and whoever takes over has trouble too."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from simulation.faults.failures import FAILURES, Trouble
from simulation.scenarios.scenario import Scenario, Trigger, play
from simulation.scenarios.test_fault_points import (
    ORDINARY,
    RELEASED,
    REPLAYED,
    RESIDENT,
    Kind,
    Moment,
    every_slot_is_used,
    nothing_began_after_the_end,
)
from simulation.system.simulated_system import ProcessRole
from sublet_protocol import limits
from sublet_protocol.messages import Grant

GAP_S = 0.8

FIRST = (
    "its worker loses its connection for a moment",
    "its worker loses its connection for long",
    "the broker restarts",
    "the broker loses patience with its ticket",
    "its worker is told to stop",
    "its worker freezes for a moment",
    "its worker freezes until its connection is gone",
    "its worker hangs for long",
    "its scheduler is killed",
)
SECOND = (
    "its worker is killed",
    "its worker loses its connection for a moment",
    "its worker loses its connection for long",
    "the broker restarts",
    "the broker loses patience with its ticket",
    "its worker is told to stop",
    "its worker freezes for a moment",
    "it is cancelled",
)
BUSY = (
    (ORDINARY, "while it runs"),
    (RELEASED, "while it goes on"),
    (RESIDENT, "while it waits"),
    (REPLAYED, "while it runs"),
)


AT_ODDS = (
    {"its worker loses its connection for a moment", "its worker loses its connection for long", "the broker restarts"},
    {
        "its worker freezes for a moment",
        "its worker freezes until its connection is gone",
        "its worker hangs for long",
    },
)
"""Of these the end of one would be the end of the other."""


def named(text: str) -> Trouble:
    return next(trouble for trouble in FAILURES if trouble.text == text)


def moment_of(kind: Kind, text: str) -> Moment:
    return next(moment for moment in kind.moments if moment.text == text)


def pairs() -> Iterator[object]:
    for kind, when in BUSY:
        for first in FIRST:
            for second in SECOND:
                if first != second and any({first, second} <= each for each in AT_ODDS):
                    continue
                yield pytest.param(
                    kind, moment_of(kind, when), named(first), named(second), id=f"{kind.text}: {first}, then {second}"
                )


@pytest.mark.parametrize(("kind", "moment", "first", "second"), list(pairs()))
def test_two_troubles_are_no_worse_than_one(kind: Kind, moment: Moment, first: Trouble, second: Trouble) -> None:
    async def script(stage: Scenario) -> None:
        def begin(role: ProcessRole) -> None:
            first.begin(stage, role)
            stage.trouble(later(role))

        async def later(role: ProcessRole) -> None:
            await asyncio.sleep(GAP_S)
            if not role.process.gone or second.harm in ("none", "cancelled"):
                second.begin(stage, role)

        stage.at(moment.cue, begin)
        stage.start(kind.workflow, kind.steps)
        await stage.all_over()
        await asyncio.sleep(2 * limits.TICKET_RETAINED_S)
        every_slot_is_used(stage)

    seen = play(script, workers=3)
    if second.harm == "cancelled":
        assert seen.run.status == "CANCELLED"
        assert nothing_began_after_the_end(seen)
    else:
        assert seen.run.status == "COMPLETED"
        costs = {first.harm, second.harm}.intersection(moment.costs)
        least = costs - {"leaves"}  # a worker that leaves may find that the wait is over meanwhile
        assert kind.bodies + bool(least) <= seen.bodies <= kind.bodies + bool(costs)


HARMFUL = (
    "its worker is killed",
    "the power of its worker fails",
    "its worker loses its connection for long",
    "its worker is told to stop twice",
    "its worker freezes until its connection is gone",
    "its worker hangs for long",
)


@pytest.mark.parametrize("trouble", [named(each) for each in HARMFUL], ids=HARMFUL)
@pytest.mark.parametrize(
    ("workflow", "steps"),
    [
        pytest.param("task", [["work", 3.0]], id="an ordinary task"),
        pytest.param("task", [["release"], ["work", 3.0]], id="a task that gave its slot away"),
        pytest.param("stayer", [["memo"], ["sleep", 0.5], ["work", 3.0]], id="a durable task that stays"),
        pytest.param("leaver", [["memo"], ["release"], ["work", 3.0]], id="a durable task that gave its slot away"),
    ],
)
def test_whoever_takes_over_has_the_same_trouble(workflow: str, steps: list[list[object]], trouble: Trouble) -> None:
    """Three times in a row, one second after it was granted; the fourth worker brings it to its end."""

    async def script(stage: Scenario) -> None:
        for nth in (1, 2, 3):
            stage.at(Trigger("received", Grant, nth, then_s=1.0), lambda role: trouble.begin(stage, role))
        stage.start(workflow, steps)
        await stage.all_over()
        await asyncio.sleep(2 * limits.TICKET_RETAINED_S)
        every_slot_is_used(stage)

    seen = play(script, workers=4)
    assert seen.run.status == "COMPLETED"
    assert seen.bodies == 4
    assert seen.task.retries_used == 0, "it was no fault of the code"
