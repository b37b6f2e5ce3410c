"""Two things happen at almost the same time, in either order: messages cross, and one of two outcomes counts."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from simulation.faults.failures import cancel, stop
from simulation.scenarios.scenario import STRICT_TIMEOUT_S, Scenario, Script, Trigger, run_scenario
from simulation.system.programs import Program
from simulation.system.simulated_system import ProcessRole
from sublet_protocol.messages import Grant

WORK_S = 1.0
"""When the task does its part of the race, after its grant."""

OFFSETS_S = [-0.05, -0.02, -0.008, -0.003, 0.0, 0.003, 0.008, 0.02, 0.05]
"""Chosen for hops of up to 4 ms to and from the broker, and round trips of up to 8 ms to the database."""

at_each_offset = pytest.mark.parametrize("after_s", OFFSETS_S, ids=lambda after_s: f"{after_s * 1_000:+.0f} ms")


def crossing(workflow: str, steps: Program, act: Callable[[Scenario, ProcessRole], None], after_s: float) -> Script:
    """``act`` happens ``after_s`` after the task's own part of the race, which follows its grant by a second."""

    async def script(scenario: Scenario) -> None:
        scenario.at(Trigger("received", Grant, then_s=WORK_S + after_s), lambda role: act(scenario, role))
        scenario.start(workflow, steps)
        await scenario.wait_for_end()
        assert not scenario.system.anomalies, "no sweeper had to repair anything"

    return script


def push(scenario: Scenario, _: ProcessRole) -> None:
    scenario.ask(scenario.system.client.event.aio_push("paid", {"n": 1}))


# --- an event -------------------------------------------------------------------------------------------------


@at_each_offset
@pytest.mark.parametrize("workflow", ["evictable", "resident"])
def test_an_event_that_crosses_with_the_wait_for_it_is_not_lost(workflow: str, after_s: float) -> None:
    result = run_scenario(crossing(workflow, [["work", WORK_S], ["event", "paid", None, None]], push, after_s))
    assert result.run.status == "COMPLETED"
    assert result.bodies == (2 if workflow == "evictable" else 1)
    assert (result.run.finished_at or 0.0) - result.run.created_at < result.bodies * WORK_S + 0.5, (
        "a sweeper found the event, not the look back"
    )


@at_each_offset
def test_an_event_that_crosses_with_the_end_of_a_sleep_counts_once(after_s: float) -> None:
    """The wait ends with the sleep or the event. In the first case the next wait for the key gets the event."""
    wait = ["wait", [[["sleep", WORK_S], ["event", "paid", None, None]]]]
    steps: Program = [wait, ["wait", [[["sleep", 1.0], ["event", "paid", None, None]]]]]
    assert run_scenario(crossing("evictable", steps, push, after_s)).run.status == "COMPLETED"


# --- a cancellation -------------------------------------------------------------------------------------------


@at_each_offset
@pytest.mark.parametrize(
    ("workflow", "steps"),
    [
        pytest.param("evictable", [["work", WORK_S], ["sleep", 3.0], ["work", 1.0]], id="an eviction"),
        pytest.param("resident", [["work", WORK_S], ["sleep", 3.0], ["work", 1.0]], id="a report of its wait"),
        pytest.param("evictable", [["work", WORK_S], ["memo"], ["work", 3.0]], id="a memo"),
        pytest.param("task", [["work", WORK_S], ["release"], ["work", 3.0]], id="a release"),
        pytest.param("task", [["work", WORK_S], ["fail", 1]], id="a failure that is retried"),
        pytest.param("evictable", [["sleep", WORK_S], ["work", 3.0]], id="the end of a wait"),
    ],
)
def test_a_cancellation_that_crosses_with_a_report_counts(workflow: str, steps: Program, after_s: float) -> None:
    result = run_scenario(crossing(workflow, steps, cancel, after_s))
    assert result.run.status == "CANCELLED"
    assert result.task.lease is None


@at_each_offset
@pytest.mark.parametrize("workflow", ["task", "evictable"])
def test_a_cancellation_that_crosses_with_the_result_gives_one_of_the_two(workflow: str, after_s: float) -> None:
    result = run_scenario(crossing(workflow, [["work", WORK_S]], cancel, after_s))
    assert result.run.status in ("COMPLETED", "CANCELLED")
    assert (result.task.output is not None) == (result.run.status == "COMPLETED")
    assert result.bodies == 1
    if abs(after_s) > 0.03:
        assert result.run.status == ("CANCELLED" if after_s < 0 else "COMPLETED")


# --- a worker that stops --------------------------------------------------------------------------------------


@at_each_offset
@pytest.mark.parametrize(
    ("workflow", "steps", "bodies"),
    [
        pytest.param("evictable", [["work", WORK_S], ["sleep", 3.0]], 2, id="an eviction"),
        pytest.param("resident", [["work", WORK_S], ["sleep", 3.0]], 2, id="the beginning of a wait in its slot"),
        pytest.param("task", [["work", WORK_S], ["release"], ["work", 1.0]], 1, id="a release"),
        pytest.param("task", [["work", WORK_S]], 1, id="a result"),
    ],
)
def test_a_stop_that_crosses_with_a_report_loses_nothing(
    workflow: str, steps: Program, bodies: int, after_s: float
) -> None:
    result = run_scenario(crossing(workflow, steps, stop, after_s))
    assert (result.run.status, result.bodies, result.task.losses) == ("COMPLETED", bodies, 0)


@at_each_offset
def test_a_stop_that_crosses_with_the_end_of_a_wait_loses_nothing(after_s: float) -> None:
    result = run_scenario(crossing("resident", [["sleep", WORK_S], ["work", 1.0]], stop, after_s))
    assert (result.run.status, result.task.losses) == ("COMPLETED", 0)
    assert result.bodies in (1, 2)


# --- a timeout ------------------------------------------------------------------------------------------------


@at_each_offset
@pytest.mark.parametrize("released", [False, True], ids=["with its slot", "without its slot"])
def test_a_result_that_crosses_with_the_timeout_gives_one_of_the_two(released: bool, after_s: float) -> None:
    async def script(scenario: Scenario) -> None:
        scenario.start("strict", [*([["release"]] if released else []), ["work", STRICT_TIMEOUT_S + after_s]])
        await scenario.wait_for_end()

    result = run_scenario(script)
    assert result.run.status in ("COMPLETED", "FAILED")
    assert (result.task.output is not None) == (result.run.status == "COMPLETED")
    assert (result.task.error is not None) == (result.run.status == "FAILED")
    assert result.bodies == 1


def test_a_timeout_is_extended_shortly_before_it_expires() -> None:
    async def script(scenario: Scenario) -> None:
        scenario.start("strict", [["work", STRICT_TIMEOUT_S - 0.01], ["refresh", 5.0], ["work", 4.0]])
        await scenario.wait_for_end()

    result = run_scenario(script)
    assert (result.run.status, result.bodies) == ("COMPLETED", 1)


def test_extensions_of_a_timeout_add_up() -> None:
    async def script(scenario: Scenario) -> None:
        scenario.start("strict", [*([["refresh", 1.0]] * 20), ["work", STRICT_TIMEOUT_S + 19.0]])
        await scenario.wait_for_end()

    result = run_scenario(script)
    assert (result.run.status, result.task.timeout_bonus_s) == ("COMPLETED", 20.0)


# --- one task of a run ----------------------------------------------------------------------------------------


def test_a_run_continues_while_one_task_waits_although_another_has_failed() -> None:
    async def script(scenario: Scenario) -> None:
        scenario.start("mixed", [])
        await asyncio.sleep(3.0)
        assert scenario.stored.status == "RUNNING"
        assert {task.name: task.status for task in scenario.stored.tasks} == {"waits": "EVICTED", "fails": "FAILED"}
        await scenario.wait_for_end()

    result = run_scenario(script)
    assert result.run.status == "FAILED"
    assert {task.name: task.status for task in result.run.tasks} == {"waits": "COMPLETED", "fails": "FAILED"}
