"""Failures, retries, timeouts, cancellation: every task ends once, and says why."""

from __future__ import annotations

import pytest

from acceptance.environment import Environment, eventually, short_delay
from acceptance.leak_checks import find_leaks
from sublet import FailedTaskRunExceptionGroup, RunCancelledError, RunStatus, TaskRunError

pytestmark = pytest.mark.real


async def failure_of(environment: Environment, workflow: str, *arguments: object) -> TaskRunError:
    """How the only task of this workflow fails."""
    with pytest.raises(FailedTaskRunExceptionGroup) as failed:
        await getattr(environment.workflows, workflow).aio_run(*arguments)
    (error,) = failed.value.exceptions
    return error


# --- retries --------------------------------------------------------------------------------------------------


async def test_a_task_is_tried_again_after_a_delay_until_it_succeeds(environment: Environment) -> None:
    await environment.worker("fail_until", slots=1)
    result = await environment.workflows.fail_until.aio_run(environment.workflows.Number(n=3))
    assert result.n == 3
    assert environment.journal.values("attempt", "number") == [1, 2, 3]


async def test_when_its_retries_are_used_up_it_has_failed(environment: Environment) -> None:
    await environment.worker("fail_until", slots=1)
    error = await failure_of(environment, "fail_until", environment.workflows.Number(n=99))
    assert (error.exc_type, error.exc) == ("RuntimeError", "attempt 4 failed")
    assert "raise RuntimeError" in error.trace
    assert environment.journal.values("attempt", "number") == [1, 2, 3, 4]


async def test_what_cannot_be_retried_is_not(environment: Environment) -> None:
    await environment.worker("give_up", slots=1)
    assert (await failure_of(environment, "give_up")).exc == "pointless"
    assert environment.journal.count("attempt") == 1


async def test_an_exception_without_a_message_fails_its_task_all_the_same(environment: Environment) -> None:
    await environment.worker("fail_silently", slots=1)
    assert (await failure_of(environment, "fail_silently")).exc_type == "KeyError"


async def test_a_durable_task_that_fails_keeps_its_log_for_the_next_attempt(environment: Environment) -> None:
    await environment.worker("stumble", durable_slots=1)
    assert (await environment.workflows.stumble.aio_run()).n == 1
    assert environment.journal.count("charged") == 1


# --- timeouts -------------------------------------------------------------------------------------------------


async def test_a_task_that_takes_too_long_is_stopped_and_has_failed(environment: Environment) -> None:
    await environment.worker("take_too_long", slots=1)
    error = await failure_of(environment, "take_too_long")
    assert (error.exc_type, error.exc) == ("TimeoutError", "Task exceeded timeout of 1 s")
    await environment.until_written("stopped")


async def test_a_thread_that_exceeds_its_timeout_is_cancelled_and_its_result_is_ignored(
    environment: Environment,
) -> None:
    await environment.worker("block_too_long", slots=1)
    run = await environment.workflows.block_too_long.aio_run(
        environment.workflows.Named(name="late"), wait_for_result=False
    )
    with pytest.raises(FailedTaskRunExceptionGroup, match="TimeoutError"):
        await run.aio_result()
    environment.journal.open_gate("late")
    await environment.until_written("noticed", cancelled=True)
    await short_delay()
    assert (await environment.details(run.workflow_run_id)).run.status == RunStatus.FAILED


async def test_a_task_can_ask_for_more_time(environment: Environment) -> None:
    await environment.worker("ask_for_time", slots=1)
    assert await environment.workflows.ask_for_time.aio_run() == {"in_time": True}


async def test_waiting_does_not_count_as_execution(environment: Environment) -> None:
    await environment.worker("think_between_naps", "nap_then_toil", durable_slots=2)
    assert (await environment.workflows.think_between_naps.aio_run()).invocations == 3
    assert (await failure_of(environment, "nap_then_toil")).exc_type == "TimeoutError"


async def test_a_task_that_no_worker_takes_in_time_is_cancelled(environment: Environment) -> None:
    await environment.worker("be_quick_or_never", "work", slots=1)
    await environment.workflows.work.aio_run(environment.workflows.Named(name="first"), wait_for_result=False)
    await environment.until_written("work began")
    with pytest.raises(RunCancelledError, match="schedule timeout"):
        await environment.workflows.be_quick_or_never.aio_run()
    environment.journal.open_gate("first")
    await environment.until_written("work ended")
    await short_delay()
    assert environment.journal.count("was quick") == 0


# --- cancelling -----------------------------------------------------------------------------------------------


async def cancelled(environment: Environment, run_id: str) -> bool:
    await environment.client.runs.aio_cancel(run_id)
    details = await environment.until_status(run_id, *(RunStatus.CANCELLED, RunStatus.COMPLETED, RunStatus.FAILED))
    return details.run.status == RunStatus.CANCELLED


async def test_a_waiting_run_is_cancelled_without_any_worker(environment: Environment) -> None:
    worker = await environment.worker("journey", "double")
    run = await environment.workflows.journey.aio_run(environment.workflows.Named(name="a"), wait_for_result=False)
    await environment.until_evicted(run.workflow_run_id)
    worker.terminate()
    worker.wait_for_end()
    assert await cancelled(environment, run.workflow_run_id)
    with pytest.raises(RunCancelledError):
        await run.aio_result()


async def test_a_running_task_is_cancelled_and_frees_its_slot(environment: Environment) -> None:
    await environment.worker("work", "double", slots=1)
    run = await environment.workflows.work.aio_run(environment.workflows.Named(name="a"), wait_for_result=False)
    await environment.until_written("work began")
    assert await cancelled(environment, run.workflow_run_id)
    assert (await environment.workflows.double.aio_run(environment.workflows.Number(n=2))).n == 4
    assert environment.journal.count("work ended") == 0


async def test_a_queued_task_is_cancelled_and_never_starts(environment: Environment) -> None:
    await environment.worker("work", slots=1)
    named = environment.workflows.Named
    await environment.workflows.work.aio_run(named(name="first"), wait_for_result=False)
    await environment.until_written("work began", name="first")
    queued = await environment.workflows.work.aio_run(named(name="queued"), wait_for_result=False)
    assert await cancelled(environment, queued.workflow_run_id)
    environment.journal.open_gate("first")
    await environment.until_written("work ended", name="first")
    await short_delay()
    assert environment.journal.count("work began", name="queued") == 0


async def test_a_task_that_waits_for_its_retry_is_cancelled_and_not_tried_again(environment: Environment) -> None:
    await environment.worker("fail_until", slots=1)
    run = await environment.workflows.fail_until.aio_run(environment.workflows.Number(n=99), wait_for_result=False)
    await environment.until_written("attempt")
    assert await cancelled(environment, run.workflow_run_id)
    attempts = environment.journal.count("attempt")
    await short_delay()
    await short_delay()
    assert environment.journal.count("attempt") == attempts


async def test_a_task_can_cancel_itself(environment: Environment) -> None:
    await environment.worker("cancel_myself", slots=1)
    with pytest.raises(RunCancelledError):
        await environment.workflows.cancel_myself.aio_run()


async def test_cancelling_what_has_ended_changes_nothing(environment: Environment) -> None:
    await environment.worker("double", slots=1)
    run = await environment.workflows.double.aio_run(environment.workflows.Number(n=2), wait_for_result=False)
    await run.aio_result()
    assert not await cancelled(environment, run.workflow_run_id)


async def test_a_cancelled_run_frees_every_slot(environment: Environment) -> None:
    await environment.worker("work", slots=3)
    runs = [
        await environment.workflows.work.aio_run(environment.workflows.Named(name=name), wait_for_result=False)
        for name in "abcdef"
    ]
    await environment.until_written("work began", 3)
    for run in runs:
        assert await cancelled(environment, run.workflow_run_id)
    await eventually(
        lambda: environment.stack.metric("scheduler", "sublet_slots", state="taken") == 0, "no slot is taken"
    )


async def test_runs_that_have_ended_leave_no_timer_and_no_wait_behind(environment: Environment) -> None:
    await environment.worker("nap", "await_payment", "clockwork", durable_slots=3)
    nap, number = environment.workflows.Nap, environment.workflows.Number
    sleeper = await environment.workflows.nap.aio_run(nap(seconds=3_600), wait_for_result=False)
    listener = await environment.workflows.await_payment.aio_run(number(n=1), wait_for_result=False)
    for run in (sleeper, listener):
        await environment.until_evicted(run.workflow_run_id)
        assert await cancelled(environment, run.workflow_run_id)
    await environment.workflows.clockwork.aio_run()

    async def nothing_is_left_behind() -> bool:
        return not await find_leaks(environment.stack)

    await eventually(nothing_is_left_behind, "no timer and no wait is left behind")


# --- outputs --------------------------------------------------------------------------------------------------


async def test_an_output_that_cannot_be_stored_fails_its_task_with_the_reason(environment: Environment) -> None:
    await environment.worker("return_a_socket", "return_much", "return_a_number", slots=1)
    assert "cannot be written as JSON" in (await failure_of(environment, "return_a_socket")).exc
    assert (
        "the limit is 1,048,576"
        in (await failure_of(environment, "return_much", environment.workflows.Number(n=2_000_000))).exc
    )
    assert "must return a dictionary" in (await failure_of(environment, "return_a_number")).exc
    largest = await environment.workflows.return_much.aio_run(environment.workflows.Number(n=1_000_000))
    assert len(largest["much"]) == 1_000_000
