"""Every failure of a run and its worker, at every point at which it makes a difference.

Each case is a sentence: the kind of task, the failure, and the point. All must fulfil the same: the run ends with the
expected status, its code starts only as often as necessary, nothing leaks, and the remaining workers can use all their
slots.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest

from simulation.faults.failures import FAILURES, Failure, Impact
from simulation.scenarios.scenario import Scenario, ScenarioResult, Trigger, run_scenario
from simulation.system.programs import Program
from sublet_protocol import limits
from sublet_protocol.messages import (
    Claim,
    Evicted,
    Failed,
    Finished,
    Grant,
    OperationCompleted,
    Recorded,
    SlotReleased,
    Ticket,
)

ANY_LOSS: tuple[Impact, ...] = ("dies", "is disconnected", "freezes", "hangs", "stops twice")
"""The failures through which a worker loses its leases."""

LATE: tuple[Impact, ...] = ("is disconnected", "freezes", "hangs", "stops twice")
"""The same, if the code still starts before the lease is lost."""

IN_THE_INBOX: tuple[Impact, ...] = ("freezes", "hangs")
"""When the worker thaws it receives the grant, and cannot know yet that the lease was lost."""


@dataclass(frozen=True)
class FaultPoint:
    """``costs``: the impacts that make the code start once more than without a failure. ``before``: how often the code
    has started at this point. ``has_result``: the broker has the run's result, so that failures cannot change it."""

    text: str
    trigger: Trigger
    before: int
    costs: tuple[Impact, ...] = ()
    has_result: bool = False


@dataclass(frozen=True)
class Kind:
    """``bodies``: how often its code starts if nothing fails."""

    text: str
    workflow: str
    steps: Program
    bodies: int
    points: tuple[FaultPoint, ...]
    ends: str = "COMPLETED"


def received(what: type, nth: int = 1, then_s: float = 0.0) -> Trigger:
    return Trigger("received", what, nth, then_s)


def sent(what: type, nth: int = 1, then_s: float = 0.0) -> Trigger:
    return Trigger("sent", what, nth, then_s)


def acked(nth: int = 1, then_s: float = 0.0) -> Trigger:
    return Trigger("acked", Ticket, nth, then_s)


RESULT = FaultPoint("when the broker has its result", sent(Finished), 1, has_result=True)

ORDINARY = Kind(
    "an ordinary task",
    "task",
    [["work", 4.0]],
    bodies=1,
    points=(
        FaultPoint("as its ticket comes", received(Ticket), 0),
        FaultPoint("as the broker gets its claim", sent(Claim), 0, IN_THE_INBOX),
        FaultPoint("as its grant comes", received(Grant), 0, LATE),
        FaultPoint("while it runs", received(Grant, then_s=2.0), 1, ANY_LOSS),
        RESULT,
        FaultPoint("as its ticket is acknowledged", acked(), 1, has_result=True),
    ),
)

RELEASED = Kind(
    "a task that released its slot",
    "task",
    [["work", 1.0], ["release"], ["work", 4.0]],
    bodies=1,
    points=(
        FaultPoint("when the broker has its release", sent(SlotReleased), 1, ANY_LOSS),
        FaultPoint("as its ticket is acknowledged", acked(), 1, ANY_LOSS),
        FaultPoint("while it continues without a slot", acked(then_s=2.0), 1, ANY_LOSS),
        RESULT,
    ),
)

EVICTED = Kind(
    "a durable task that is evicted while it waits",
    "evictable",
    [["memo"], ["work", 1.0], ["sleep", 4.0], ["work", 1.0]],
    bodies=2,
    points=(
        FaultPoint("as its grant comes", received(Grant), 0, LATE),
        FaultPoint("while it runs", received(Grant, then_s=0.5), 1, ANY_LOSS),
        FaultPoint("when the broker has its eviction", sent(Evicted), 1),
        FaultPoint("as its ticket is acknowledged", acked(), 1),
        FaultPoint("while it is evicted", acked(then_s=2.0), 1),
        FaultPoint("as the ticket for its resume comes", received(Ticket, 2), 1),
        FaultPoint("as the broker gets the claim for its resume", sent(Claim, 2), 1, IN_THE_INBOX),
        replace(RESULT, before=2),
    ),
)

REPLAYED = Kind(
    "a durable task under replay",
    "evictable",
    [["memo"], ["child", "task", [["work", 0.5]]], ["sleep", 2.0], ["now"], ["sleep", 2.0], ["work", 4.0]],
    bodies=4,
    points=(
        FaultPoint("as its second grant comes", received(Grant, 2), 1, ("is disconnected", "freezes", "hangs")),
        FaultPoint("when the broker has its second eviction", sent(Evicted, 2), 2),
        FaultPoint("as its last grant comes", received(Grant, 4), 3, LATE),
        FaultPoint("while it runs", received(Grant, 4, then_s=1.0), 4, ANY_LOSS),
        FaultPoint("when the broker has its result", sent(Finished), 4, has_result=True),
        FaultPoint("as its ticket is acknowledged", acked(3), 4, has_result=True),
    ),
)

RESIDENT = Kind(
    "a durable task that waits in its slot",
    "resident",
    [["memo"], ["work", 1.0], ["sleep", 4.0], ["work", 1.0]],
    bodies=1,
    points=(
        FaultPoint("when the broker knows its memo", sent(Recorded), 1, (*ANY_LOSS, "stops")),
        FaultPoint("when the broker knows what it waits for", sent(Recorded, 2), 1, (*ANY_LOSS, "stops")),
        FaultPoint("while it waits", sent(Recorded, 2, then_s=2.0), 1, (*ANY_LOSS, "stops")),
        FaultPoint("as its wait completes", received(OperationCompleted), 1, ANY_LOSS),
        RESULT,
    ),
)

RELEASED_DURABLE = Kind(
    "a durable task that released its slot",
    "evictable",
    [["release"], ["work", 2.0], ["sleep", 4.0], ["work", 1.0]],
    bodies=2,
    points=(
        FaultPoint("when the broker has its release", sent(SlotReleased), 1, ANY_LOSS),
        FaultPoint("while it continues without a slot", acked(then_s=1.0), 1, ANY_LOSS),
        FaultPoint("when the broker has its eviction", sent(Evicted), 1),
        FaultPoint("while it is evicted", sent(Evicted, then_s=2.0), 1),
        FaultPoint("when the broker has its second release", sent(SlotReleased, 2), 2, ANY_LOSS),
        replace(RESULT, before=2),
    ),
)

FAILING = Kind(
    "a task that fails once",
    "task",
    [["work", 1.0], ["fail", 1], ["work", 2.0]],
    bodies=2,
    points=(
        FaultPoint("when the broker has its failure", sent(Failed), 1),
        FaultPoint("while it waits for its retry", sent(Failed, then_s=1.5), 1),
        FaultPoint("as the grant of its retry comes", received(Grant, 2), 1, LATE),
        FaultPoint("while its retry runs", received(Grant, 2, then_s=2.0), 2, ANY_LOSS),
        replace(RESULT, before=2),
    ),
)

SLOW = Kind(
    "a task that exceeds its timeout",
    "strict",
    [["work", 30.0]],
    bodies=1,
    ends="FAILED",
    points=(
        FaultPoint("while it runs", received(Grant, then_s=5.0), 1, ANY_LOSS),
        FaultPoint("when the broker has its timeout", sent(Failed), 1, has_result=True),
        FaultPoint("as its ticket is acknowledged", acked(), 1, has_result=True),
    ),
)

SLOW_RELEASED = Kind(
    "a task that released its slot and exceeds its timeout",
    "strict",
    [["release"], ["work", 30.0]],
    bodies=1,
    ends="FAILED",
    points=(
        FaultPoint("while it continues without a slot", acked(then_s=5.0), 1, ANY_LOSS),
        FaultPoint("when the broker has its timeout", sent(Failed), 1, has_result=True),
    ),
)

KINDS = (
    ORDINARY,
    RELEASED,
    EVICTED,
    REPLAYED,
    RESIDENT,
    RELEASED_DURABLE,
    FAILING,
    SLOW,
    SLOW_RELEASED,
)


def cases() -> Iterator[object]:
    for kind in KINDS:
        for point in kind.points:
            for failure in FAILURES:
                if not (failure.text == "its replay is requested" and point.has_result):
                    yield pytest.param(kind, point, failure, id=f"{kind.text}: {failure.text} {point.text}")


@pytest.mark.parametrize(("kind", "point", "failure"), list(cases()))
def test_a_run_ends_as_expected_in_spite_of_a_failure(kind: Kind, point: FaultPoint, failure: Failure) -> None:
    async def script(scenario: Scenario) -> None:
        scenario.at(point.trigger, lambda role: failure.begin(scenario, role))
        scenario.start(kind.workflow, kind.steps)
        await scenario.wait_for_end()
        await asyncio.sleep(2 * limits.TICKET_RETAINED_S)
        use_every_slot(scenario)

    result = run_scenario(script)
    if failure.impact == "cancelled" and not point.has_result:
        assert result.run.status == "CANCELLED"
        assert point.before <= result.bodies <= point.before + 1
        assert nothing_started_after_the_end(result)
    else:
        assert result.run.status == kind.ends
        assert result.bodies == kind.bodies + (failure.impact in point.costs)


def use_every_slot(scenario: Scenario) -> None:
    """Start more tasks of both kinds than there are slots: a slot that leaked would keep one from ending."""
    for _ in range(3):
        scenario.start("task", [["work", 0.5]])
        scenario.start("evictable", [["work", 0.5]])


def nothing_started_after_the_end(result: ScenarioResult) -> bool:
    """A grant that was in transit at the end may still start code."""
    finished_at = result.run.finished_at
    return finished_at is not None and all(started_at < finished_at + 0.1 for started_at in result.started_at)
