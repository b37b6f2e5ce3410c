"""Everything that can go wrong with a run and its worker, at every moment at which that makes a difference.

Each case is a sentence: what kind of task it is, what happens, and when. What must hold is the same for all: the run
ends as it should, its code is begun just as often as it must be, no slot stays taken, nothing is left behind, and the
workers that are left can use all their slots.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest

from simulation.faults.failures import FAILURES, Impact, Trouble
from simulation.scenarios.scenario import Scenario, Seen, Trigger, play
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

ALL_OF_IT: tuple[Impact, ...] = ("dies", "is away", "freezes", "hangs", "leaves twice")
"""Whatever costs a worker its leases."""

LATE: tuple[Impact, ...] = ("is away", "freezes", "hangs", "leaves twice")
"""The same, if the code begins before the lease is lost."""

IN_THE_INBOX: tuple[Impact, ...] = ("freezes", "hangs")
"""Its worker will find the grant when it thaws, and cannot know yet that the lease was lost."""


@dataclass(frozen=True)
class Moment:
    """``costs``: the harm that makes the code begin once more than it would otherwise. ``before``: how often it has
    begun by then. ``over``: the run has got its result, so that nothing changes that any more."""

    text: str
    cue: Trigger
    before: int
    costs: tuple[Impact, ...] = ()
    over: bool = False


@dataclass(frozen=True)
class Kind:
    """``bodies``: how often its code begins if nothing goes wrong."""

    text: str
    workflow: str
    steps: Program
    bodies: int
    moments: tuple[Moment, ...]
    ends: str = "COMPLETED"


def received(what: type, nth: int = 1, then_s: float = 0.0) -> Trigger:
    return Trigger("received", what, nth, then_s)


def sent(what: type, nth: int = 1, then_s: float = 0.0) -> Trigger:
    return Trigger("sent", what, nth, then_s)


def acked(nth: int = 1, then_s: float = 0.0) -> Trigger:
    return Trigger("acked", Ticket, nth, then_s)


RESULT = Moment("when the broker has its result", sent(Finished), 1, over=True)

ORDINARY = Kind(
    "an ordinary task",
    "task",
    [["work", 4.0]],
    bodies=1,
    moments=(
        Moment("as its ticket comes", received(Ticket), 0),
        Moment("as the broker gets its claim", sent(Claim), 0, IN_THE_INBOX),
        Moment("as its grant comes", received(Grant), 0, LATE),
        Moment("while it runs", received(Grant, then_s=2.0), 1, ALL_OF_IT),
        RESULT,
        Moment("as its slot is given back", acked(), 1, over=True),
    ),
)

RELEASED = Kind(
    "a task that gave its slot away",
    "task",
    [["work", 1.0], ["release"], ["work", 4.0]],
    bodies=1,
    moments=(
        Moment("when the broker has its release", sent(SlotReleased), 1, ALL_OF_IT),
        Moment("as its slot is given back", acked(), 1, ALL_OF_IT),
        Moment("while it goes on", acked(then_s=2.0), 1, ALL_OF_IT),
        RESULT,
    ),
)

EVICTED = Kind(
    "a durable task that leaves to wait",
    "leaver",
    [["memo"], ["work", 1.0], ["sleep", 4.0], ["work", 1.0]],
    bodies=2,
    moments=(
        Moment("as its grant comes", received(Grant), 0, LATE),
        Moment("while it runs", received(Grant, then_s=0.5), 1, ALL_OF_IT),
        Moment("when the broker has its checkpoint", sent(Evicted), 1),
        Moment("as its slot is given back", acked(), 1),
        Moment("while it is evicted", acked(then_s=2.0), 1),
        Moment("as the ticket for its return comes", received(Ticket, 2), 1),
        Moment("as the broker gets the claim for its return", sent(Claim, 2), 1, IN_THE_INBOX),
        replace(RESULT, before=2),
    ),
)

REPLAYED = Kind(
    "a durable task under replay",
    "leaver",
    [["memo"], ["child", "task", [["work", 0.5]]], ["sleep", 2.0], ["now"], ["sleep", 2.0], ["work", 4.0]],
    bodies=4,
    moments=(
        Moment("as its second grant comes", received(Grant, 2), 1, ("is away", "freezes", "hangs")),
        Moment("when the broker has its second checkpoint", sent(Evicted, 2), 2),
        Moment("as its last grant comes", received(Grant, 4), 3, LATE),
        Moment("while it runs", received(Grant, 4, then_s=1.0), 4, ALL_OF_IT),
        Moment("when the broker has its result", sent(Finished), 4, over=True),
        Moment("as its slot is given back", acked(3), 4, over=True),
    ),
)

RESIDENT = Kind(
    "a durable task that waits in its slot",
    "stayer",
    [["memo"], ["work", 1.0], ["sleep", 4.0], ["work", 1.0]],
    bodies=1,
    moments=(
        Moment("when the broker knows its memo", sent(Recorded), 1, (*ALL_OF_IT, "leaves")),
        Moment("when the broker knows what it waits for", sent(Recorded, 2), 1, (*ALL_OF_IT, "leaves")),
        Moment("while it waits", sent(Recorded, 2, then_s=2.0), 1, (*ALL_OF_IT, "leaves")),
        Moment("as its wait is over", received(OperationCompleted), 1, ALL_OF_IT),
        RESULT,
    ),
)

RELEASED_DURABLE = Kind(
    "a durable task that gave its slot away",
    "leaver",
    [["release"], ["work", 2.0], ["sleep", 4.0], ["work", 1.0]],
    bodies=2,
    moments=(
        Moment("when the broker has its release", sent(SlotReleased), 1, ALL_OF_IT),
        Moment("while it goes on", acked(then_s=1.0), 1, ALL_OF_IT),
        Moment("when the broker has its checkpoint", sent(Evicted), 1),
        Moment("while it is evicted", sent(Evicted, then_s=2.0), 1),
        Moment("when the broker has its second release", sent(SlotReleased, 2), 2, ALL_OF_IT),
        replace(RESULT, before=2),
    ),
)

FAILING = Kind(
    "a task that fails once",
    "task",
    [["work", 1.0], ["fail", 1], ["work", 2.0]],
    bodies=2,
    moments=(
        Moment("when the broker has its failure", sent(Failed), 1),
        Moment("while it waits for its retry", sent(Failed, then_s=1.5), 1),
        Moment("as the grant of its retry comes", received(Grant, 2), 1, LATE),
        Moment("while its retry runs", received(Grant, 2, then_s=2.0), 2, ALL_OF_IT),
        replace(RESULT, before=2),
    ),
)

SLOW = Kind(
    "a task that works for too long",
    "strict",
    [["work", 30.0]],
    bodies=1,
    ends="FAILED",
    moments=(
        Moment("while it runs", received(Grant, then_s=5.0), 1, ALL_OF_IT),
        Moment("when the broker knows that its time is over", sent(Failed), 1, over=True),
        Moment("as its slot is given back", acked(), 1, over=True),
    ),
)

SLOW_RELEASED = Kind(
    "a task that gave its slot away and works for too long",
    "strict",
    [["release"], ["work", 30.0]],
    bodies=1,
    ends="FAILED",
    moments=(
        Moment("while it goes on", acked(then_s=5.0), 1, ALL_OF_IT),
        Moment("when the broker knows that its time is over", sent(Failed), 1, over=True),
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
        for moment in kind.moments:
            for trouble in FAILURES:
                if not (trouble.text == "its replay is asked for" and moment.over):
                    yield pytest.param(kind, moment, trouble, id=f"{kind.text}: {trouble.text} {moment.text}")


@pytest.mark.parametrize(("kind", "moment", "trouble"), list(cases()))
def test_it_ends_as_it_should(kind: Kind, moment: Moment, trouble: Trouble) -> None:
    async def script(stage: Scenario) -> None:
        stage.at(moment.cue, lambda role: trouble.begin(stage, role))
        stage.start(kind.workflow, kind.steps)
        await stage.all_over()
        await asyncio.sleep(2 * limits.TICKET_RETAINED_S)
        every_slot_is_used(stage)

    seen = play(script)
    if trouble.harm == "cancelled" and not moment.over:
        assert seen.run.status == "CANCELLED"
        assert moment.before <= seen.bodies <= moment.before + 1
        assert nothing_began_after_the_end(seen)
    else:
        assert seen.run.status == kind.ends
        assert seen.bodies == kind.bodies + (trouble.harm in moment.costs)


def every_slot_is_used(stage: Scenario) -> None:
    """More tasks of both kinds than there are slots."""
    for _ in range(3):
        stage.start("task", [["work", 0.5]])
        stage.start("leaver", [["work", 0.5]])


def nothing_began_after_the_end(seen: Seen) -> bool:
    """A grant may have been under way, no more."""
    finished_at = seen.run.finished_at
    return finished_at is not None and all(began_at < finished_at + 0.1 for began_at in seen.began_at)
