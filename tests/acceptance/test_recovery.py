"""Processes die, and others resume their work: nothing is lost, and recorded operations are not repeated."""

from __future__ import annotations

import asyncio
from pathlib import Path
from textwrap import dedent

import pytest

from acceptance.environment import Environment, eventually, short_delay
from acceptance.stack import Stack
from chaos.durable_dag_load import assert_all_completed, start_runs
from sublet import FailedTaskRunExceptionGroup, RunStatus

pytestmark = pytest.mark.real


# --- workers --------------------------------------------------------------------------------------------------


async def test_a_waiting_task_goes_on_elsewhere_after_its_worker_was_killed(environment: Environment) -> None:
    first = await environment.worker("journey", "double", slots=1, durable_slots=1)
    run = await environment.workflows.journey.aio_run(wait_for_result=False)
    await environment.until_written("journey invoked", 2)  # its child is back
    await environment.until_evicted(run.workflow_run_id)
    first.kill()
    await environment.worker("journey", "double", slots=1, durable_slots=1)
    environment.journal.open_gate("journey")
    await environment.client.event.aio_push("answer", {"n": 42})
    result = await run.aio_result()
    assert len(set(result.workers)) == 2
    assert (result.receipt, result.doubled, result.answer) == (1, 42, {"n": 42})
    assert environment.journal.count("charged") == 1
    assert environment.journal.count("doubled") == 1


async def test_a_working_task_goes_on_elsewhere_after_its_worker_was_killed(environment: Environment) -> None:
    first = await environment.worker("journey", "double", slots=1, durable_slots=1)
    run = await environment.workflows.journey.aio_run(wait_for_result=False)
    await environment.until_written("journey invoked", 2)  # its child is back
    await environment.client.event.aio_push("answer", {})
    await environment.until_written("journey answered")
    await environment.worker("journey", "double", slots=1, durable_slots=1)
    first.kill()
    await environment.until_written("journey answered", 2)
    environment.journal.open_gate("journey")
    result = await run.aio_result()
    assert len(set(result.workers)) == 2
    assert environment.journal.count("charged") == 1
    assert environment.journal.count("doubled") == 1
    (task,) = (await environment.details(run.workflow_run_id)).tasks
    assert task.status == RunStatus.COMPLETED


async def test_ordinary_tasks_of_a_killed_worker_run_again_elsewhere(environment: Environment) -> None:
    first = await environment.worker("work", slots=3)
    work, named = environment.workflows.work, environment.workflows.Named
    runs = [await work.aio_run(named(name=name), wait_for_result=False) for name in "abcde"]
    await environment.until_written("work began", 3)
    first.kill()
    await environment.worker("work", slots=5)
    for name in "abcde":
        environment.journal.open_gate(name)
    results = await asyncio.gather(*(run.aio_result() for run in runs))
    assert len({result.worker for result in results}) == 1
    assert environment.journal.count("work ended") == 5


async def test_a_worker_that_was_frozen_too_long_is_not_listened_to(environment: Environment) -> None:
    first = await environment.worker("work", slots=1)
    run = await environment.workflows.work.aio_run(environment.workflows.Named(name="a"), wait_for_result=False)
    await environment.until_written("work began")
    await environment.worker("work", slots=1)
    first.pause()
    await environment.until_written("work began", 2)
    first.resume()
    environment.journal.open_gate("a")
    result = await run.aio_result()
    await short_delay()
    assert (await environment.details(run.workflow_run_id)).run.status == RunStatus.COMPLETED
    (task,) = (await environment.details(run.workflow_run_id)).tasks
    assert task.output == {"worker": result.worker, "invocations": 0}


async def test_a_worker_that_stops_evicts_waiting_tasks_and_finishes_running_ones(
    environment: Environment,
) -> None:
    first = await environment.worker("stay", "work", slots=1, durable_slots=1)
    waiting = await environment.workflows.stay.aio_run(environment.workflows.Named(name="a"), wait_for_result=False)
    working = await environment.workflows.work.aio_run(environment.workflows.Named(name="b"), wait_for_result=False)
    await environment.until_written("stay invoked")
    await environment.until_written("work began")
    first.terminate()
    await environment.until_evicted(waiting.workflow_run_id)
    assert first.running, "it still works"
    environment.journal.open_gate("b")
    await working.aio_result()
    assert first.wait_for_end() == 0
    assert environment.journal.count("work began") == 1

    await environment.worker("stay", "work", slots=1, durable_slots=1)
    await environment.client.event.aio_push("leave", {"name": "a"})
    assert (await waiting.aio_result()).invocations == 2


async def test_a_lifespan_lasts_until_the_last_task_has_ended(environment: Environment) -> None:
    worker = await environment.worker("use_lifespan", slots=1, variables={"SUBLET_TEST_LIFESPAN": "lifespan"})
    run = await environment.workflows.use_lifespan.aio_run(environment.workflows.Named(name="a"), wait_for_result=False)
    await environment.until_written("work began")
    worker.terminate()
    await short_delay()
    assert environment.journal.count("lifespan ended") == 0
    environment.journal.open_gate("a")
    assert await run.aio_result() == {"pool": "of connections"}
    assert worker.wait_for_end() == 0
    assert [entry["what"] for entry in environment.journal.all()] == [
        "lifespan began",
        "work began",
        "work ended",
        "lifespan ended",
    ]


async def test_a_second_signal_ends_a_worker_at_once_and_its_task_runs_elsewhere(environment: Environment) -> None:
    first = await environment.worker("work", slots=1)
    run = await environment.workflows.work.aio_run(environment.workflows.Named(name="a"), wait_for_result=False)
    await environment.until_written("work began")
    first.terminate()
    await eventually(lambda: not first.ready, "the worker is leaving")
    first.terminate()
    assert first.wait_for_end() != 0
    await environment.worker("work", slots=1)
    await environment.until_written("work began", 2)
    environment.journal.open_gate("a")
    await run.aio_result()


# --- changed code ---------------------------------------------------------------------------------------------

BEFORE = """
    from acceptance.workflows import *

    @client.durable_task()
    async def changing(input: EmptyModel, ctx: DurableContext) -> None:
        await ctx.aio_sleep_for("100ms")
        await ctx.aio_wait_for_event("go on")

    worker = client.worker("changing", workflows=[changing])
"""
AFTER = BEFORE.replace('ctx.aio_wait_for_event("go on")', "double.aio_run(Number(n=1))")


async def test_the_error_of_changed_code_names_the_recorded_and_the_requested_operation(
    environment: Environment, tmp_path: Path
) -> None:
    module = tmp_path / "changing.py"
    module.write_text(dedent(BEFORE))
    first = await environment.worker(app="changing:worker", path=tmp_path)
    changing = environment.client.stubs.task(name="changing")
    run = await changing.aio_run(wait_for_result=False)

    async def waits_for_the_event() -> bool:
        (task,) = (await environment.details(run.workflow_run_id)).tasks
        return task.is_evicted and task.invocation == 2

    await eventually(waits_for_the_event, "the run waits for its event")
    first.terminate()
    first.wait_for_end()

    module.write_text(dedent(AFTER))
    await environment.worker(app="changing:worker", path=tmp_path)
    await environment.client.event.aio_push("go on", {})
    with pytest.raises(FailedTaskRunExceptionGroup) as failed:
        await run.aio_result()
    (error,) = failed.value.exceptions
    assert error.exc_type == "NonDeterminismError"
    assert "operation 2" in error.exc
    assert "event" in error.exc
    assert "go on" in error.exc, "what was recorded"
    assert "double" in error.exc, "what was asked"
    assert environment.journal.count("doubled") == 0


# --- services -------------------------------------------------------------------------------------------------


async def test_shards_move_within_seconds_when_a_scheduler_is_killed(
    environment: Environment, mended_stack: Stack
) -> None:
    await environment.worker("durable_dag", "double", slots=4, durable_slots=4)
    first = mended_stack.the("scheduler")
    second = mended_stack.launch("scheduler")
    second.wait_until_ready()
    held = "sublet_shards_held"
    await eventually(lambda: first.metric(held) == second.metric(held) == 2, "each has its share")
    runs = await start_runs(environment, 60)
    await environment.until_written("started", 20)
    first.kill()
    await assert_all_completed(environment, runs)
    await eventually(lambda: second.metric(held) == 4, "the other one has them all")


async def test_a_scheduler_that_was_killed_alone_goes_on_when_it_is_back(
    environment: Environment, mended_stack: Stack
) -> None:
    await environment.worker("durable_dag", "double", slots=4, durable_slots=4)
    runs = await start_runs(environment, 40)
    await environment.until_written("started", 10)
    scheduler = mended_stack.the("scheduler")
    scheduler.kill()
    scheduler.start()
    await assert_all_completed(environment, runs)


async def test_a_scheduler_that_stops_gracefully_leaves_its_shards_to_the_other(
    environment: Environment, mended_stack: Stack
) -> None:
    await environment.worker("durable_dag", "double", slots=4, durable_slots=4)
    second = mended_stack.launch("scheduler")
    second.wait_until_ready()
    runs = await start_runs(environment, 40)
    await environment.until_written("started", 10)
    first = mended_stack.of("scheduler")[0]
    first.terminate()
    assert first.wait_for_end() == 0
    await assert_all_completed(environment, runs)


@pytest.mark.parametrize("service", ["timer", "event-ingest"])
async def test_nothing_is_lost_while_a_service_is_down(
    environment: Environment, mended_stack: Stack, service: str
) -> None:
    await environment.worker("durable_dag", "double", "on_number", slots=4, durable_slots=4)
    runs = await start_runs(environment, 40)
    await environment.until_written("started", 10)
    process = mended_stack.the(service)
    process.kill()
    await environment.client.event.aio_push("number.while-dead", {"n": 1})
    more = await start_runs(environment, 10, first=100)
    await short_delay()
    process.start()
    await assert_all_completed(environment, runs | more)
    await environment.until_written("triggered", n=1)
    assert environment.journal.count("triggered") == 1
