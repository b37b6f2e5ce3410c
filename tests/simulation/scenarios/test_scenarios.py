"""Scenarios with their own scripts: replaced workers come back, slots and workers run out, workers stop slowly."""

from __future__ import annotations

import asyncio

import pytest

from simulation.faults.failures import AWAY_S, FAILURES, Failure, cancel, freeze, kill, stop, time_out_tickets
from simulation.scenarios.scenario import URGENT_S, Scenario, Trigger, run_scenario
from simulation.system.programs import Program
from simulation.system.simulated_system import ProcessRole
from sublet_engine.run.state import Run
from sublet_protocol import ids, limits
from sublet_protocol.messages import Grant, Revoked, SlotReleased, TimeoutExtended

BRIEFLY_S = 2.0


# --- replaced workers come back -------------------------------------------------------------------------------


def test_a_worker_that_was_replaced_cannot_release_the_slot_of_its_successor() -> None:
    successor_kept_its_slot: list[bool] = []

    async def script(scenario: Scenario) -> None:
        def check(_: ProcessRole) -> None:
            lease = scenario.task.lease
            successor_kept_its_slot.append(lease is not None and not lease.released)

        scenario.at(Trigger("received", Grant, then_s=1.0), lambda role: freeze(32.0)(scenario, role))
        # The first release is that of the worker that was replaced.
        scenario.at(Trigger("sent", SlotReleased, then_s=0.5), check)
        scenario.start("task", [["work", 4.0], ["release"], ["work", 2.0]])
        await scenario.wait_for_end()

    result = run_scenario(script)
    assert successor_kept_its_slot == [True]
    assert (result.run.status, result.bodies) == ("COMPLETED", 2)


def test_a_worker_that_was_replaced_cannot_extend_the_timeout_of_its_successor() -> None:
    bonus_s: list[float] = []

    async def script(scenario: Scenario) -> None:
        scenario.at(Trigger("received", Grant, then_s=1.0), lambda role: freeze(32.0)(scenario, role))
        scenario.at(
            Trigger("sent", TimeoutExtended, then_s=0.5), lambda _: bonus_s.append(scenario.task.timeout_bonus_s)
        )
        scenario.start("task", [["work", 4.0], ["refresh", 100.0], ["work", 2.0]])
        await scenario.wait_for_end()

    assert run_scenario(script).run.status == "COMPLETED"
    assert bonus_s == [0.0]


def test_a_worker_that_was_replaced_receives_that_its_lease_is_revoked() -> None:
    revoked: list[str] = []

    async def script(scenario: Scenario) -> None:
        scenario.at(Trigger("received", Grant, then_s=1.0), lambda role: freeze(AWAY_S)(scenario, role))
        scenario.at(Trigger("received", Revoked), lambda role: revoked.append(role.name))
        scenario.start("task", [["work", 20.0]])
        await scenario.wait_for_end()

    result = run_scenario(script)
    assert len(revoked) == 1
    assert (result.run.status, result.bodies) == ("COMPLETED", 2)


@pytest.mark.parametrize(
    ("workflow", "steps"),
    [
        pytest.param("task", [["work", 3.0]], id="an ordinary task"),
        pytest.param("task", [["release"], ["work", 3.0]], id="a task that released its slot"),
        pytest.param("resident", [["memo"], ["sleep", 3.0], ["work", 1.0]], id="a durable task that waits in its slot"),
        pytest.param("evictable", [["memo"], ["release"], ["work", 3.0]], id="a durable task that released its slot"),
    ],
)
def test_the_only_worker_gets_the_task_again_after_it_hung(workflow: str, steps: Program) -> None:
    """The old code and the new run side by side on one worker, for a point."""

    async def script(scenario: Scenario) -> None:
        scenario.at(Trigger("received", Grant, then_s=1.0), lambda role: freeze(AWAY_S)(scenario, role))
        scenario.start(workflow, steps)
        await scenario.wait_for_end()

    result = run_scenario(script, workers=1)
    assert (result.run.status, result.bodies) == ("COMPLETED", 2)


# --- detection times ------------------------------------------------------------------------------------------

HOLDERS = [
    pytest.param("task", [["work", 20.0]], id="an ordinary task"),
    pytest.param("resident", [["memo"], ["sleep", 20.0]], id="a durable task that waits in its slot"),
    pytest.param("evictable", [["memo"], ["work", 20.0]], id="a durable task"),
]
RELEASED = [
    pytest.param("task", [["release"], ["work", 20.0]], id="a task that released its slot"),
    pytest.param("evictable", [["memo"], ["release"], ["work", 20.0]], id="a durable task that released its slot"),
]


@pytest.mark.parametrize(("workflow", "steps"), HOLDERS)
def test_a_redelivered_ticket_reveals_a_dead_worker_within_seconds(workflow: str, steps: Program) -> None:
    assert restarted_after_s(workflow, steps) < limits.RECLAIM_GRACE_S + 2 * limits.TICK_INTERVAL_S


@pytest.mark.parametrize(("workflow", "steps"), RELEASED)
def test_missing_heartbeats_reveal_a_dead_worker_where_there_is_no_ticket(workflow: str, steps: Program) -> None:
    assert restarted_after_s(workflow, steps) < limits.WORKER_LOST_S + 2 * limits.TICK_INTERVAL_S


def restarted_after_s(workflow: str, steps: Program) -> float:
    died_at: list[float] = []

    async def script(scenario: Scenario) -> None:
        def die(role: ProcessRole) -> None:
            died_at.append(role.process.clock.now())
            kill(scenario, role)

        scenario.at(Trigger("received", Grant, then_s=1.0), die)
        scenario.start(workflow, steps)
        await scenario.wait_for_end()

    return run_scenario(script).started_at[1] - died_at[0]


@pytest.mark.parametrize(("workflow", "steps"), [*HOLDERS, *RELEASED])
def test_the_code_of_a_cancelled_task_is_stopped_at_once(workflow: str, steps: Program) -> None:
    async def script(scenario: Scenario) -> None:
        def begin(role: ProcessRole) -> None:
            cancel(scenario, role)
            scenario.run_in_background(check())

        async def check() -> None:
            await asyncio.sleep(limits.CANCEL_GRACE_S + 0.5)
            assert [body.ended for body in scenario.bodies] == [True]

        scenario.at(Trigger("received", Grant, then_s=1.2), begin)
        scenario.start(workflow, steps)
        await scenario.wait_for_end()

    assert run_scenario(script).run.status == "CANCELLED"


# --- workers run out ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gone_s", [BRIEFLY_S, AWAY_S], ids=["after 2 s", "after 40 s"])
@pytest.mark.parametrize(
    ("workflow", "steps", "bodies"),
    [
        pytest.param("task", [["work", 3.0]], 2, id="an ordinary task"),
        pytest.param("task", [["release"], ["work", 3.0]], 2, id="a task that released its slot"),
        pytest.param("resident", [["memo"], ["sleep", 3.0]], 2, id="a durable task that waits in its slot"),
        pytest.param(
            "evictable", [["memo"], ["release"], ["work", 3.0]], 2, id="a durable task that released its slot"
        ),
        pytest.param("evictable", [["memo"], ["sleep", 3.0]], 2, id="a durable task that is evicted"),
    ],
)
def test_the_only_worker_dies_and_comes_back(workflow: str, steps: Program, bodies: int, gone_s: float) -> None:
    async def script(scenario: Scenario) -> None:
        def die(role: ProcessRole) -> None:
            kill(scenario, role)
            scenario.run_in_background(come_back(role))

        async def come_back(role: ProcessRole) -> None:
            await asyncio.sleep(gone_s)
            await scenario.system.start(role.name)

        scenario.at(Trigger("received", Grant, then_s=1.0), die)
        scenario.start(workflow, steps)
        await scenario.wait_for_end()

    result = run_scenario(script, workers=1)
    assert (result.run.status, result.bodies) == ("COMPLETED", bodies)


@pytest.mark.parametrize(
    "steps",
    [
        pytest.param([["work", 3.0]], id="an ordinary task"),
        pytest.param([["release"], ["work", 3.0]], id="a task that released its slot"),
    ],
)
def test_a_task_that_loses_too_many_workers_fails(steps: Program) -> None:
    losses = limits.MAX_LOSSES + 1

    async def script(scenario: Scenario) -> None:
        for nth in range(1, losses + 1):
            scenario.at(
                Trigger("received", Grant, nth, then_s=0.5),
                lambda role: scenario.run_in_background(die_and_come_back(scenario, role)),
            )
        scenario.start("task", steps)
        await scenario.wait_for_end()

    result = run_scenario(script, workers=2)
    assert result.run.status == "FAILED"
    assert result.task.error is not None
    assert result.task.error.type == "WorkerLost"
    assert (result.bodies, result.task.retries_used) == (losses, 0)


async def die_and_come_back(scenario: Scenario, role: ProcessRole) -> None:
    kill(scenario, role)
    await asyncio.sleep(BRIEFLY_S)
    await scenario.system.start(role.name)


def test_the_released_and_the_running_task_of_a_dead_worker_both_restart() -> None:
    async def script(scenario: Scenario) -> None:
        def start_another(role: ProcessRole) -> None:
            scenario.start("task", [["work", 5.0]])
            scenario.run_in_background(later(role))

        async def later(role: ProcessRole) -> None:
            await asyncio.sleep(BRIEFLY_S)
            assert scenario.system.history.busy(role.process, durable=False) == 1
            await die_and_come_back(scenario, role)

        scenario.at(Trigger("sent", SlotReleased), start_another)
        scenario.start("task", [["release"], ["work", 5.0]])
        await scenario.wait_for_end()
        assert len(scenario.system.history.bodies) == 4

    assert run_scenario(script, workers=1).bodies == 2


# --- repeated losses of the connection -----------------------------------------------------------------------


@pytest.mark.parametrize("what", ["its connection breaks", "the broker times out the delivery of its ticket"])
@pytest.mark.parametrize(
    ("workflow", "steps"),
    [
        pytest.param("task", [["work", 45.0]], id="an ordinary task"),
        pytest.param("task", [["release"], ["work", 45.0]], id="a task that released its slot"),
        pytest.param("resident", [["sleep", 45.0]], id="a durable task that waits in its slot"),
    ],
)
def test_a_task_keeps_running_through_repeated_losses_of_its_connection_or_ticket(
    workflow: str, steps: Program, what: str
) -> None:
    async def script(scenario: Scenario) -> None:
        async def again_and_again(role: ProcessRole) -> None:
            for _ in range(12):
                if what == "its connection breaks":
                    role.cut(0.5)
                else:
                    time_out_tickets(scenario, role)
                await asyncio.sleep(3.0)

        scenario.at(
            Trigger("received", Grant, then_s=1.0), lambda role: scenario.run_in_background(again_and_again(role))
        )
        scenario.start(workflow, steps)
        await scenario.wait_for_end()

    result = run_scenario(script)
    assert (result.run.status, result.bodies, result.task.losses) == ("COMPLETED", 1, 0)


@pytest.mark.parametrize(
    "failure", [t for t in FAILURES if t.impact == "none" and not t.of_the_run], ids=lambda failure: failure.text
)
def test_released_tasks_and_the_one_in_the_slot_keep_running(failure: Failure) -> None:
    """Six tasks on one worker with one slot. What cannot impact one of them harms none."""

    async def script(scenario: Scenario) -> None:
        for _ in range(5):
            scenario.start("task", [["release"], ["work", 10.0]])
        scenario.start("task", [["work", 10.0]])
        await asyncio.sleep(3.0)
        assert len(scenario.system.history.bodies) == 6
        failure.begin(scenario, scenario.system.roles["worker-0"])
        await scenario.wait_for_end()
        assert len(scenario.system.history.bodies) == 6

    run_scenario(script, workers=1)


# --- stopping -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "steps",
    [
        pytest.param([["work", 50.0]], id="an ordinary task"),
        pytest.param([["release"], ["work", 50.0]], id="a task that released its slot"),
    ],
)
def test_a_worker_that_stops_slowly_is_not_considered_lost(steps: Program) -> None:
    async def script(scenario: Scenario) -> None:
        scenario.at(Trigger("received", Grant, then_s=1.0), lambda role: stop(scenario, role))
        scenario.start("task", steps)
        await scenario.wait_for_end()

    result = run_scenario(script)
    assert (result.run.status, result.bodies, result.task.losses) == ("COMPLETED", 1, 0)


def test_a_task_that_releases_its_slot_while_its_worker_stops_finishes_there() -> None:
    async def script(scenario: Scenario) -> None:
        scenario.at(Trigger("received", Grant, then_s=1.0), lambda role: stop(scenario, role))
        scenario.start("task", [["work", 3.0], ["release"], ["work", 3.0]])
        await scenario.wait_for_end()

    result = run_scenario(script)
    assert (result.run.status, result.bodies) == ("COMPLETED", 1)


def test_a_run_that_waits_while_both_workers_stop_resumes_on_the_next_one() -> None:
    async def script(scenario: Scenario) -> None:
        async def stop_both(role: ProcessRole) -> None:
            await asyncio.gather(*(scenario.system.stop(name) for name in ("worker-0", "worker-1")))
            await asyncio.sleep(AWAY_S)
            await scenario.system.start(role.name)

        scenario.at(Trigger("received", Grant, then_s=1.0), lambda role: scenario.run_in_background(stop_both(role)))
        scenario.start("resident", [["memo"], ["sleep", 5.0], ["work", 1.0]])
        await scenario.wait_for_end()

    result = run_scenario(script)
    assert (result.run.status, result.bodies, result.task.losses) == ("COMPLETED", 2, 0)


# --- slots run out --------------------------------------------------------------------------------------------


def occupy_every_slot(scenario: Scenario, workflow: str, for_s: float) -> None:
    for _ in scenario.system.plan.workers:
        scenario.start(workflow, [["work", for_s]])


def last_run(scenario: Scenario) -> Run:
    return max(scenario.system.database.runs.values(), key=lambda run: run.created_at)


@pytest.mark.parametrize(
    "failure",
    [
        None,
        *(failure for failure in FAILURES if failure.impact not in ("cancelled", "stops") and not failure.of_the_run),
    ],
    ids=lambda failure: failure.text if failure else "no failure",
)
def test_a_task_that_finds_no_slot_in_time_is_cancelled_in_spite_of_failures(
    failure: Failure | None,
) -> None:
    async def script(scenario: Scenario) -> None:
        occupy_every_slot(scenario, "task", 55.0)  # longer than an outage and the grace time after it
        await asyncio.sleep(1.0)
        scenario.start("urgent", [["work", 1.0]])
        await asyncio.sleep(1.0)
        if failure is not None:
            failure.begin(scenario, scenario.system.roles["worker-0"])
        await scenario.wait_for_end()
        late = last_run(scenario)
        assert late.status == "CANCELLED"
        assert "schedule timeout" in (late.tasks[0].reason or "")
        assert not [body for body in scenario.system.history.bodies if ids.run_of(body.task_run_id) == late.id]

    run_scenario(script)


def test_a_released_slot_is_in_time_for_a_task_with_a_short_schedule_timeout() -> None:
    async def script(scenario: Scenario) -> None:
        for _ in range(2):
            scenario.start("task", [["work", 3.0], ["release"], ["work", 40.0]])
        await asyncio.sleep(1.0)
        scenario.start("urgent", [["work", 1.0]])
        await scenario.wait_for_end()
        assert last_run(scenario).status == "COMPLETED"

    run_scenario(script)


def test_the_schedule_timeout_does_not_apply_to_a_resume() -> None:
    async def script(scenario: Scenario) -> None:
        scenario.start("urgent_evictable", [["memo"], ["sleep", 2.0], ["work", 1.0]])
        await asyncio.sleep(1.0)
        occupy_every_slot(scenario, "resident", 30.0)
        await scenario.wait_for_end()

    result = run_scenario(script)
    assert (result.run.status, result.bodies) == ("COMPLETED", 2)
    assert (result.run.finished_at or 0.0) - result.run.created_at > 30.0


@pytest.mark.parametrize(
    ("workflow", "steps", "ends"),
    [
        pytest.param("urgent", [["work", 3.0]], "CANCELLED", id="an ordinary task is cancelled"),
        pytest.param("urgent_evictable", [["work", 3.0]], "CANCELLED", id="a durable task without a log is cancelled"),
        pytest.param(
            "urgent_evictable", [["memo"], ["work", 3.0]], "COMPLETED", id="a durable task with a log resumes later"
        ),
    ],
)
def test_a_task_waits_for_longer_than_its_schedule_timeout_after_its_worker_died(
    workflow: str, steps: Program, ends: str
) -> None:
    async def script(scenario: Scenario) -> None:
        def die(role: ProcessRole) -> None:
            kill(scenario, role)
            scenario.run_in_background(come_back(role))

        async def come_back(role: ProcessRole) -> None:
            await asyncio.sleep(limits.WORKER_LOST_S + 2 * URGENT_S)
            await scenario.system.start(role.name)

        scenario.at(Trigger("received", Grant, then_s=1.0), die)
        scenario.start(workflow, steps)
        await scenario.wait_for_end()

    assert run_scenario(script, workers=1).run.status == ends


def test_a_retry_gets_the_whole_schedule_timeout_again() -> None:
    """It waits for its backoff and then for a slot, each for longer than the first attempt could have waited."""

    async def script(scenario: Scenario) -> None:
        scenario.start("task", [["work", 1.0], ["fail", 1], ["work", 1.0]])
        await asyncio.sleep(2.0)
        occupy_every_slot(scenario, "task", 30.0)
        await scenario.wait_for_end()

    result = run_scenario(script)
    assert (result.run.status, result.bodies, result.task.retries_used) == ("COMPLETED", 2, 1)
