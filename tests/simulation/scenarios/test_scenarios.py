"""Scenes that need a script of their own: who was replaced comes back, things cross, slots and workers run out."""

from __future__ import annotations

import asyncio

import pytest

from simulation.faults.failures import AWAY_S, FAILURES, Trouble, cancel, freeze, kill, stop, time_out_tickets
from simulation.scenarios.scenario import HASTE_S, Scenario, Trigger, play
from simulation.system.programs import Program
from simulation.system.simulated_system import ProcessRole
from sublet_engine.run.state import Run
from sublet_protocol import ids, limits
from sublet_protocol.messages import Grant, Revoked, SlotReleased, TimeoutExtended

SOON_S = 2.0


# --- who was replaced comes back ------------------------------------------------------------------------------


def test_a_worker_that_was_replaced_cannot_release_the_slot_of_its_successor() -> None:
    successor_kept_its_slot: list[bool] = []

    async def script(stage: Scenario) -> None:
        def look(_: ProcessRole) -> None:
            lease = stage.task.lease
            successor_kept_its_slot.append(lease is not None and not lease.released)

        stage.at(Trigger("received", Grant, then_s=1.0), lambda role: freeze(32.0)(stage, role))
        stage.at(Trigger("sent", SlotReleased, then_s=0.5), look)  # the first is that of the worker that was replaced
        stage.start("task", [["work", 4.0], ["release"], ["work", 2.0]])
        await stage.all_over()

    seen = play(script)
    assert successor_kept_its_slot == [True]
    assert (seen.run.status, seen.bodies) == ("COMPLETED", 2)


def test_a_worker_that_was_replaced_cannot_get_time_for_its_successor() -> None:
    bonus_s: list[float] = []

    async def script(stage: Scenario) -> None:
        stage.at(Trigger("received", Grant, then_s=1.0), lambda role: freeze(32.0)(stage, role))
        stage.at(Trigger("sent", TimeoutExtended, then_s=0.5), lambda _: bonus_s.append(stage.task.timeout_bonus_s))
        stage.start("task", [["work", 4.0], ["refresh", 100.0], ["work", 2.0]])
        await stage.all_over()

    assert play(script).run.status == "COMPLETED"
    assert bonus_s == [0.0]


def test_a_worker_that_was_replaced_is_told_to_stop() -> None:
    told: list[str] = []

    async def script(stage: Scenario) -> None:
        stage.at(Trigger("received", Grant, then_s=1.0), lambda role: freeze(AWAY_S)(stage, role))
        stage.at(Trigger("received", Revoked), lambda role: told.append(role.name))
        stage.start("task", [["work", 20.0]])
        await stage.all_over()

    seen = play(script)
    assert len(told) == 1
    assert (seen.run.status, seen.bodies) == ("COMPLETED", 2)


@pytest.mark.parametrize(
    ("workflow", "steps"),
    [
        pytest.param("task", [["work", 3.0]], id="an ordinary task"),
        pytest.param("task", [["release"], ["work", 3.0]], id="a task that gave its slot away"),
        pytest.param("stayer", [["memo"], ["sleep", 3.0], ["work", 1.0]], id="a durable task that waits in its slot"),
        pytest.param("leaver", [["memo"], ["release"], ["work", 3.0]], id="a durable task that gave its slot away"),
    ],
)
def test_the_only_worker_succeeds_itself(workflow: str, steps: Program) -> None:
    """The old code and the new run side by side on one worker, for a moment."""

    async def script(stage: Scenario) -> None:
        stage.at(Trigger("received", Grant, then_s=1.0), lambda role: freeze(AWAY_S)(stage, role))
        stage.start(workflow, steps)
        await stage.all_over()

    seen = play(script, workers=1)
    assert (seen.run.status, seen.bodies) == ("COMPLETED", 2)


# --- how soon -------------------------------------------------------------------------------------------------

HOLDERS = [
    pytest.param("task", [["work", 20.0]], id="an ordinary task"),
    pytest.param("stayer", [["memo"], ["sleep", 20.0]], id="a durable task that waits in its slot"),
    pytest.param("leaver", [["memo"], ["work", 20.0]], id="a durable task"),
]
RELEASED = [
    pytest.param("task", [["release"], ["work", 20.0]], id="a task that gave its slot away"),
    pytest.param("leaver", [["memo"], ["release"], ["work", 20.0]], id="a durable task that gave its slot away"),
]


@pytest.mark.parametrize(("workflow", "steps"), HOLDERS)
def test_the_ticket_of_a_dead_worker_tells_of_its_death_within_seconds(workflow: str, steps: Program) -> None:
    assert began_again_after_s(workflow, steps) < limits.RECLAIM_GRACE_S + 2 * limits.TICK_INTERVAL_S


@pytest.mark.parametrize(("workflow", "steps"), RELEASED)
def test_the_silence_of_a_dead_worker_tells_of_its_death_where_there_is_no_ticket(
    workflow: str, steps: Program
) -> None:
    assert began_again_after_s(workflow, steps) < limits.WORKER_LOST_S + 2 * limits.TICK_INTERVAL_S


def began_again_after_s(workflow: str, steps: Program) -> float:
    died_at: list[float] = []

    async def script(stage: Scenario) -> None:
        def die(role: ProcessRole) -> None:
            died_at.append(role.process.clock.now())
            kill(stage, role)

        stage.at(Trigger("received", Grant, then_s=1.0), die)
        stage.start(workflow, steps)
        await stage.all_over()

    return play(script).began_at[1] - died_at[0]


@pytest.mark.parametrize(("workflow", "steps"), [*HOLDERS, *RELEASED])
def test_the_code_of_a_cancelled_task_is_stopped_at_once(workflow: str, steps: Program) -> None:
    async def script(stage: Scenario) -> None:
        def begin(role: ProcessRole) -> None:
            cancel(stage, role)
            stage.trouble(look())

        async def look() -> None:
            await asyncio.sleep(limits.CANCEL_GRACE_S + 0.5)
            assert [body.ended for body in stage.bodies] == [True]

        stage.at(Trigger("received", Grant, then_s=1.2), begin)
        stage.start(workflow, steps)
        await stage.all_over()

    assert play(script).run.status == "CANCELLED"


# --- workers run out ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gone_s", [SOON_S, AWAY_S], ids=["at once", "after long"])
@pytest.mark.parametrize(
    ("workflow", "steps", "bodies"),
    [
        pytest.param("task", [["work", 3.0]], 2, id="an ordinary task"),
        pytest.param("task", [["release"], ["work", 3.0]], 2, id="a task that gave its slot away"),
        pytest.param("stayer", [["memo"], ["sleep", 3.0]], 2, id="a durable task that waits in its slot"),
        pytest.param("leaver", [["memo"], ["release"], ["work", 3.0]], 2, id="a durable task that gave its slot away"),
        pytest.param("leaver", [["memo"], ["sleep", 3.0]], 2, id="a durable task that is evicted"),
    ],
)
def test_the_only_worker_dies_and_comes_back(workflow: str, steps: Program, bodies: int, gone_s: float) -> None:
    async def script(stage: Scenario) -> None:
        def die(role: ProcessRole) -> None:
            kill(stage, role)
            stage.trouble(come_back(role))

        async def come_back(role: ProcessRole) -> None:
            await asyncio.sleep(gone_s)
            await stage.world.start(role.name)

        stage.at(Trigger("received", Grant, then_s=1.0), die)
        stage.start(workflow, steps)
        await stage.all_over()

    seen = play(script, workers=1)
    assert (seen.run.status, seen.bodies) == ("COMPLETED", bodies)


@pytest.mark.parametrize(
    "steps",
    [
        pytest.param([["work", 3.0]], id="an ordinary task"),
        pytest.param([["release"], ["work", 3.0]], id="a task that gave its slot away"),
    ],
)
def test_a_task_that_kills_its_workers_again_and_again_fails_in_the_end(steps: Program) -> None:
    losses = limits.MAX_LOSSES + 1

    async def script(stage: Scenario) -> None:
        for nth in range(1, losses + 1):
            stage.at(
                Trigger("received", Grant, nth, then_s=0.5), lambda role: stage.trouble(die_and_come_back(stage, role))
            )
        stage.start("task", steps)
        await stage.all_over()

    seen = play(script, workers=2)
    assert seen.run.status == "FAILED"
    assert seen.task.error is not None
    assert seen.task.error.type == "WorkerLost"
    assert (seen.bodies, seen.task.retries_used) == (losses, 0)


async def die_and_come_back(stage: Scenario, role: ProcessRole) -> None:
    kill(stage, role)
    await asyncio.sleep(SOON_S)
    await stage.world.start(role.name)


def test_a_worker_that_dies_takes_down_what_it_released_and_what_it_runs_and_both_begin_again() -> None:
    async def script(stage: Scenario) -> None:
        def next_comes(role: ProcessRole) -> None:
            stage.start("task", [["work", 5.0]])
            stage.trouble(later(role))

        async def later(role: ProcessRole) -> None:
            await asyncio.sleep(SOON_S)
            assert stage.world.history.busy(role.process, durable=False) == 1
            await die_and_come_back(stage, role)

        stage.at(Trigger("sent", SlotReleased), next_comes)
        stage.start("task", [["release"], ["work", 5.0]])
        await stage.all_over()
        assert len(stage.world.history.bodies) == 4

    assert play(script, workers=1).bodies == 2


# --- the connection is lost again and again -------------------------------------------------------------------


@pytest.mark.parametrize("what", ["its connection breaks", "the broker loses patience with its ticket"])
@pytest.mark.parametrize(
    ("workflow", "steps"),
    [
        pytest.param("task", [["work", 45.0]], id="an ordinary task"),
        pytest.param("task", [["release"], ["work", 45.0]], id="a task that gave its slot away"),
        pytest.param("stayer", [["sleep", 45.0]], id="a durable task that waits in its slot"),
    ],
)
def test_a_task_runs_on_whatever_is_lost_again_and_again(workflow: str, steps: Program, what: str) -> None:
    async def script(stage: Scenario) -> None:
        async def again_and_again(role: ProcessRole) -> None:
            for _ in range(12):
                if what == "its connection breaks":
                    role.cut(0.5)
                else:
                    time_out_tickets(stage, role)
                await asyncio.sleep(3.0)

        stage.at(Trigger("received", Grant, then_s=1.0), lambda role: stage.trouble(again_and_again(role)))
        stage.start(workflow, steps)
        await stage.all_over()

    seen = play(script)
    assert (seen.run.status, seen.bodies, seen.task.losses) == ("COMPLETED", 1, 0)


@pytest.mark.parametrize(
    "trouble", [t for t in FAILURES if t.harm == "none" and not t.of_the_run], ids=lambda trouble: trouble.text
)
def test_tasks_that_gave_their_slots_away_and_the_one_that_has_it_run_on(trouble: Trouble) -> None:
    """Six tasks on one worker with one slot. What cannot harm one of them harms none."""

    async def script(stage: Scenario) -> None:
        for _ in range(5):
            stage.start("task", [["release"], ["work", 10.0]])
        stage.start("task", [["work", 10.0]])
        await asyncio.sleep(3.0)
        assert len(stage.world.history.bodies) == 6
        trouble.begin(stage, stage.world.roles["worker-0"])
        await stage.all_over()
        assert len(stage.world.history.bodies) == 6

    play(script, workers=1)


# --- leaving --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "steps",
    [
        pytest.param([["work", 50.0]], id="an ordinary task"),
        pytest.param([["release"], ["work", 50.0]], id="a task that gave its slot away"),
    ],
)
def test_a_worker_that_takes_long_to_leave_is_not_taken_for_dead(steps: Program) -> None:
    async def script(stage: Scenario) -> None:
        stage.at(Trigger("received", Grant, then_s=1.0), lambda role: stop(stage, role))
        stage.start("task", steps)
        await stage.all_over()

    seen = play(script)
    assert (seen.run.status, seen.bodies, seen.task.losses) == ("COMPLETED", 1, 0)


def test_a_task_that_releases_its_slot_while_its_worker_leaves_finishes_there() -> None:
    async def script(stage: Scenario) -> None:
        stage.at(Trigger("received", Grant, then_s=1.0), lambda role: stop(stage, role))
        stage.start("task", [["work", 3.0], ["release"], ["work", 3.0]])
        await stage.all_over()

    seen = play(script)
    assert (seen.run.status, seen.bodies) == ("COMPLETED", 1)


def test_a_run_that_waits_while_both_workers_leave_goes_on_with_the_next_one() -> None:
    async def script(stage: Scenario) -> None:
        async def all_leave(role: ProcessRole) -> None:
            await asyncio.gather(*(stage.world.stop(name) for name in ("worker-0", "worker-1")))
            await asyncio.sleep(AWAY_S)
            await stage.world.start(role.name)

        stage.at(Trigger("received", Grant, then_s=1.0), lambda role: stage.trouble(all_leave(role)))
        stage.start("stayer", [["memo"], ["sleep", 5.0], ["work", 1.0]])
        await stage.all_over()

    seen = play(script)
    assert (seen.run.status, seen.bodies, seen.task.losses) == ("COMPLETED", 2, 0)


# --- slots run out --------------------------------------------------------------------------------------------


def take_every_slot(stage: Scenario, workflow: str, for_s: float) -> None:
    for _ in stage.world.plan.workers:
        stage.start(workflow, [["work", for_s]])


def last_run(stage: Scenario) -> Run:
    return max(stage.world.database.runs.values(), key=lambda run: run.created_at)


@pytest.mark.parametrize(
    "trouble",
    [
        None,
        *(trouble for trouble in FAILURES if trouble.harm not in ("cancelled", "leaves") and not trouble.of_the_run),
    ],
    ids=lambda trouble: trouble.text if trouble else "nothing else goes wrong",
)
def test_a_task_that_finds_no_slot_in_time_is_cancelled_whatever_happens_to_those_that_have_them(
    trouble: Trouble | None,
) -> None:
    async def script(stage: Scenario) -> None:
        take_every_slot(stage, "task", 55.0)  # longer than an outage, after which nobody is blamed for a while
        await asyncio.sleep(1.0)
        stage.start("hasty", [["work", 1.0]])
        await asyncio.sleep(1.0)
        if trouble is not None:
            trouble.begin(stage, stage.world.roles["worker-0"])
        await stage.all_over()
        late = last_run(stage)
        assert late.status == "CANCELLED"
        assert "schedule timeout" in (late.tasks[0].reason or "")
        assert not [body for body in stage.world.history.bodies if ids.run_of(body.task_run_id) == late.id]

    play(script)


def test_a_slot_that_is_given_away_comes_in_time_for_a_task_in_haste() -> None:
    async def script(stage: Scenario) -> None:
        for _ in range(2):
            stage.start("task", [["work", 3.0], ["release"], ["work", 40.0]])
        await asyncio.sleep(1.0)
        stage.start("hasty", [["work", 1.0]])
        await stage.all_over()
        assert last_run(stage).status == "COMPLETED"

    play(script)


def test_a_task_that_went_on_to_wait_finds_its_slot_however_long_that_takes() -> None:
    async def script(stage: Scenario) -> None:
        stage.start("hasty_leaver", [["memo"], ["sleep", 2.0], ["work", 1.0]])
        await asyncio.sleep(1.0)
        take_every_slot(stage, "stayer", 30.0)
        await stage.all_over()

    seen = play(script)
    assert (seen.run.status, seen.bodies) == ("COMPLETED", 2)
    assert (seen.run.finished_at or 0.0) - seen.run.created_at > 30.0


@pytest.mark.parametrize(
    ("workflow", "steps", "ends"),
    [
        pytest.param("hasty", [["work", 3.0]], "CANCELLED", id="an ordinary task is cancelled"),
        pytest.param("hasty_leaver", [["work", 3.0]], "CANCELLED", id="so is a durable one that got nowhere"),
        pytest.param("hasty_leaver", [["memo"], ["work", 3.0]], "COMPLETED", id="one with a log goes on some day"),
    ],
)
def test_after_its_worker_died_there_is_none_for_long(workflow: str, steps: Program, ends: str) -> None:
    async def script(stage: Scenario) -> None:
        def die(role: ProcessRole) -> None:
            kill(stage, role)
            stage.trouble(come_back(role))

        async def come_back(role: ProcessRole) -> None:
            await asyncio.sleep(limits.WORKER_LOST_S + 2 * HASTE_S)
            await stage.world.start(role.name)

        stage.at(Trigger("received", Grant, then_s=1.0), die)
        stage.start(workflow, steps)
        await stage.all_over()

    assert play(script, workers=1).run.status == ends


def test_a_retry_gets_the_whole_schedule_timeout_again() -> None:
    """It waits for its delay and then for a slot, each for longer than the first attempt could have waited."""

    async def script(stage: Scenario) -> None:
        stage.start("task", [["work", 1.0], ["fail", 1], ["work", 1.0]])
        await asyncio.sleep(2.0)
        take_every_slot(stage, "task", 30.0)
        await stage.all_over()

    seen = play(script)
    assert (seen.run.status, seen.bodies, seen.task.retries_used) == ("COMPLETED", 2, 1)
