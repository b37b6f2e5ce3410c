"""``release_slot()`` with one slot: the next task starts while the first goes on, a task like any other."""

from __future__ import annotations

from typing import Any

import pytest

from acceptance.environment import Environment, eventually, short_delay
from sublet import FailedTaskRunExceptionGroup, RunCancelledError, TaskRunRef

pytestmark = pytest.mark.real


async def release(environment: Environment, name: str, then: str = "return") -> TaskRunRef[Any, Any]:
    """A run that has given its slot away, and waits at the gate of its name."""
    run: TaskRunRef[Any, Any] = await environment.workflows.release.aio_run(
        environment.workflows.Release(name=name, then=then), wait_for_result=False
    )
    await environment.until_written("slot released", name=name)
    return run


async def the_only_slot_is_free(environment: Environment) -> bool:
    """Another task begins and ends on it."""
    return bool((await environment.workflows.double.aio_run(environment.workflows.Number(n=1))).n == 2)


async def test_the_next_tasks_run_while_the_first_goes_on_and_returns_its_result(environment: Environment) -> None:
    await environment.worker("release", "double", slots=1)
    run = await release(environment, "a")
    assert await the_only_slot_is_free(environment)
    assert await the_only_slot_is_free(environment)
    environment.journal.open_gate("a")
    assert (await run.aio_result()).invocations == 1
    assert environment.journal.count("release began") == 1


async def test_a_thread_can_release_its_slot(environment: Environment) -> None:
    await environment.worker("release_in_a_thread", "double", slots=1)
    run = await environment.workflows.release_in_a_thread.aio_run(
        environment.workflows.Named(name="a"), wait_for_result=False
    )
    await environment.until_written("slot released")
    assert await the_only_slot_is_free(environment)
    environment.journal.open_gate("a")
    await run.aio_result()


async def test_many_tasks_that_released_their_slot_go_on_at_once(environment: Environment) -> None:
    await environment.worker("release", slots=1)
    runs = [await release(environment, name) for name in "abcde"]
    for name in "abcde":
        environment.journal.open_gate(name)
    for run in runs:
        await run.aio_result()


async def test_a_second_release_does_nothing(environment: Environment) -> None:
    await environment.worker("release", "work", slots=1)
    run = await release(environment, "a", then="release again")
    named = environment.workflows.Named
    await environment.workflows.work.aio_run(named(name="holds the slot"), wait_for_result=False)
    await environment.until_written("work began", name="holds the slot")
    await environment.workflows.work.aio_run(named(name="waits"), wait_for_result=False)
    environment.journal.open_gate("a")
    await run.aio_result()
    await short_delay()
    assert environment.journal.count("work began", name="waits") == 0, "the slot was released once, not twice"
    environment.journal.open_gate("holds the slot")
    await environment.until_written("work began", name="waits")
    environment.journal.open_gate("waits")


async def test_it_can_fail(environment: Environment) -> None:
    await environment.worker("release", "double", slots=1)
    run = await release(environment, "a", then="fail for good")
    environment.journal.open_gate("a")
    with pytest.raises(FailedTaskRunExceptionGroup, match="no use"):
        await run.aio_result()
    assert environment.journal.count("release began") == 1
    assert await the_only_slot_is_free(environment)


async def test_its_retry_takes_a_slot_again(environment: Environment) -> None:
    await environment.worker("release", "work", slots=1)
    run = await release(environment, "a", then="fail once")
    await environment.workflows.work.aio_run(environment.workflows.Named(name="holds the slot"), wait_for_result=False)
    await environment.until_written("work began", name="holds the slot")
    environment.journal.open_gate("a")
    await short_delay()
    assert environment.journal.count("release began", name="a") == 1, "there is no slot for the second attempt"
    environment.journal.open_gate("holds the slot")
    assert (await run.aio_result()).invocations == 2


async def test_it_can_time_out(environment: Environment) -> None:
    await environment.worker("release_for_too_long", "double", slots=1)
    run = await environment.workflows.release_for_too_long.aio_run(
        environment.workflows.Named(name="a"), wait_for_result=False
    )
    with pytest.raises(FailedTaskRunExceptionGroup, match="TimeoutError"):
        await run.aio_result()
    await environment.until_written("stopped", name="a")
    assert await the_only_slot_is_free(environment)


async def test_it_can_be_cancelled(environment: Environment) -> None:
    await environment.worker("release_for_too_long", "release", "double", slots=1)
    run = await release(environment, "a")
    await environment.client.runs.aio_cancel(run.workflow_run_id)
    with pytest.raises(RunCancelledError):
        await run.aio_result()
    assert await the_only_slot_is_free(environment)
    environment.journal.open_gate("a")
    await short_delay()
    assert (await environment.details(run.workflow_run_id)).run.status == "CANCELLED"


async def test_its_workers_death_makes_it_begin_elsewhere(environment: Environment) -> None:
    first = await environment.worker("release", slots=1)
    run = await release(environment, "a")
    environment.launch_worker("release", slots=1)
    first.kill()
    await environment.until_written("slot released", 2, name="a")
    environment.journal.open_gate("a")
    result = await run.aio_result()
    assert result.invocations == 2
    assert len(set(environment.journal.values("release began", "worker"))) == 2


async def test_a_worker_that_stops_finishes_tasks_that_released_their_slot(environment: Environment) -> None:
    worker = await environment.worker("release", slots=1)
    run = await release(environment, "a")
    worker.terminate()
    await eventually(lambda: not worker.ready, "the worker is leaving")
    environment.journal.open_gate("a")
    assert (await run.aio_result()).invocations == 1
    assert worker.wait_for_end() == 0


async def test_a_durable_task_can_release_its_slot_and_then_wait(environment: Environment) -> None:
    await environment.worker("release_and_wait", "greet", durable_slots=1)
    run = await environment.workflows.release_and_wait.aio_run(
        environment.workflows.Named(name="a"), wait_for_result=False
    )
    await environment.until_written("slot released")
    await environment.workflows.greet.aio_run()
    environment.journal.open_gate("a")
    await environment.until_evicted(run.workflow_run_id)
    await environment.workflows.greet.aio_run()
    await environment.client.event.aio_push("leave", {})
    assert (await run.aio_result()).invocations == 2
    await environment.workflows.greet.aio_run()
