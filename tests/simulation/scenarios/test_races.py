"""Two things happen at the same time, a little earlier or a little later: messages cross, and one outcome counts."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from simulation.faults.failures import cancel, stop
from simulation.scenarios.scenario import STRICT_TIMEOUT_S, Scenario, Script, Trigger, play
from simulation.system.programs import Program
from simulation.system.simulated_system import ProcessRole
from sublet_protocol.messages import Grant

WORK_S = 1.0
"""Then the task does what the other thing crosses with."""

CLOSE_S = [-0.05, -0.02, -0.008, -0.003, 0.0, 0.003, 0.008, 0.02, 0.05]
"""Around a hop of up to four milliseconds to the broker, another from it, and four for a round trip to the database."""

near = pytest.mark.parametrize("after_s", CLOSE_S, ids=lambda after_s: f"{after_s * 1_000:+.0f} ms")


def crossing(workflow: str, steps: Program, act: Callable[[Scenario, ProcessRole], None], after_s: float) -> Script:
    """A second after its grant the task does something; ``act`` comes that much later."""

    async def script(stage: Scenario) -> None:
        stage.at(Trigger("received", Grant, then_s=WORK_S + after_s), lambda role: act(stage, role))
        stage.start(workflow, steps)
        await stage.all_over()
        assert not stage.world.anomalies, "nothing had to be found by a sweeper"

    return script


def push(stage: Scenario, _: ProcessRole) -> None:
    stage.ask(stage.world.client.event.aio_push("paid", {"n": 1}))


# --- an event -------------------------------------------------------------------------------------------------


@near
@pytest.mark.parametrize("workflow", ["leaver", "stayer"])
def test_an_event_that_crosses_with_the_wait_for_it_is_not_lost(workflow: str, after_s: float) -> None:
    seen = play(crossing(workflow, [["work", WORK_S], ["event", "paid", None, None]], push, after_s))
    assert seen.run.status == "COMPLETED"
    assert seen.bodies == (2 if workflow == "leaver" else 1)
    assert (seen.run.finished_at or 0.0) - seen.run.created_at < seen.bodies * WORK_S + 0.5, (
        "it was not found later by chance"
    )


@near
def test_an_event_that_crosses_with_the_end_of_a_sleep_counts_once(after_s: float) -> None:
    """The wait ends by one of the two, and the next wait for the same key finds the event if that one did not."""
    wait = ["wait", [[["sleep", WORK_S], ["event", "paid", None, None]]]]
    steps: Program = [wait, ["wait", [[["sleep", 1.0], ["event", "paid", None, None]]]]]
    assert play(crossing("leaver", steps, push, after_s)).run.status == "COMPLETED"


# --- a cancellation -------------------------------------------------------------------------------------------


@near
@pytest.mark.parametrize(
    ("workflow", "steps"),
    [
        pytest.param("leaver", [["work", WORK_S], ["sleep", 3.0], ["work", 1.0]], id="a checkpoint"),
        pytest.param("stayer", [["work", WORK_S], ["sleep", 3.0], ["work", 1.0]], id="what it waits for"),
        pytest.param("leaver", [["work", WORK_S], ["memo"], ["work", 3.0]], id="a memo"),
        pytest.param("task", [["work", WORK_S], ["release"], ["work", 3.0]], id="a release"),
        pytest.param("task", [["work", WORK_S], ["fail", 1]], id="a failure that is retried"),
        pytest.param("leaver", [["sleep", WORK_S], ["work", 3.0]], id="the end of a wait"),
    ],
)
def test_a_cancellation_that_crosses_with_a_report_counts(workflow: str, steps: Program, after_s: float) -> None:
    seen = play(crossing(workflow, steps, cancel, after_s))
    assert seen.run.status == "CANCELLED"
    assert seen.task.lease is None


@near
@pytest.mark.parametrize("workflow", ["task", "leaver"])
def test_a_cancellation_that_crosses_with_the_result_gives_one_of_the_two(workflow: str, after_s: float) -> None:
    seen = play(crossing(workflow, [["work", WORK_S]], cancel, after_s))
    assert seen.run.status in ("COMPLETED", "CANCELLED")
    assert (seen.task.output is not None) == (seen.run.status == "COMPLETED")
    assert seen.bodies == 1
    if abs(after_s) > 0.03:
        assert seen.run.status == ("CANCELLED" if after_s < 0 else "COMPLETED")


# --- a worker that leaves -------------------------------------------------------------------------------------


@near
@pytest.mark.parametrize(
    ("workflow", "steps", "bodies"),
    [
        pytest.param("leaver", [["work", WORK_S], ["sleep", 3.0]], 2, id="a checkpoint"),
        pytest.param("stayer", [["work", WORK_S], ["sleep", 3.0]], 2, id="the beginning of a wait in its slot"),
        pytest.param("task", [["work", WORK_S], ["release"], ["work", 1.0]], 1, id="a release"),
        pytest.param("task", [["work", WORK_S]], 1, id="a result"),
    ],
)
def test_a_stop_that_crosses_with_a_report_loses_nothing(
    workflow: str, steps: Program, bodies: int, after_s: float
) -> None:
    seen = play(crossing(workflow, steps, stop, after_s))
    assert (seen.run.status, seen.bodies, seen.task.losses) == ("COMPLETED", bodies, 0)


@near
def test_a_stop_that_crosses_with_the_end_of_a_wait_loses_nothing(after_s: float) -> None:
    seen = play(crossing("stayer", [["sleep", WORK_S], ["work", 1.0]], stop, after_s))
    assert (seen.run.status, seen.task.losses) == ("COMPLETED", 0)
    assert seen.bodies in (1, 2)


# --- a timeout ------------------------------------------------------------------------------------------------


@near
@pytest.mark.parametrize("released", [False, True], ids=["with its slot", "without its slot"])
def test_a_result_that_crosses_with_the_timeout_gives_one_of_the_two(released: bool, after_s: float) -> None:
    async def script(stage: Scenario) -> None:
        stage.start("strict", [*([["release"]] if released else []), ["work", STRICT_TIMEOUT_S + after_s]])
        await stage.all_over()

    seen = play(script)
    assert seen.run.status in ("COMPLETED", "FAILED")
    assert (seen.task.output is not None) == (seen.run.status == "COMPLETED")
    assert (seen.task.error is not None) == (seen.run.status == "FAILED")
    assert seen.bodies == 1


def test_time_that_is_asked_for_in_the_last_moment_is_given() -> None:
    async def script(stage: Scenario) -> None:
        stage.start("strict", [["work", STRICT_TIMEOUT_S - 0.01], ["refresh", 5.0], ["work", 4.0]])
        await stage.all_over()

    seen = play(script)
    assert (seen.run.status, seen.bodies) == ("COMPLETED", 1)


def test_time_that_is_asked_for_again_and_again_adds_up() -> None:
    async def script(stage: Scenario) -> None:
        stage.start("strict", [*([["refresh", 1.0]] * 20), ["work", STRICT_TIMEOUT_S + 19.0]])
        await stage.all_over()

    seen = play(script)
    assert (seen.run.status, seen.task.timeout_bonus_s) == ("COMPLETED", 20.0)


# --- one task of a run ----------------------------------------------------------------------------------------


def test_a_run_goes_on_as_long_as_one_of_its_tasks_waits_although_another_has_failed() -> None:
    async def script(stage: Scenario) -> None:
        stage.start("mixed", [])
        await asyncio.sleep(3.0)
        assert stage.stored.status == "RUNNING"
        assert {task.name: task.status for task in stage.stored.tasks} == {"waits": "EVICTED", "fails": "FAILED"}
        await stage.all_over()

    seen = play(script)
    assert seen.run.status == "FAILED"
    assert {task.name: task.status for task in seen.run.tasks} == {"waits": "COMPLETED", "fails": "FAILED"}
