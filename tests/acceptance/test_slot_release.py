"""``release_slot()`` with one slot: the next task starts while the first goes on, a task like any other."""

from __future__ import annotations

from typing import Any

import pytest

from acceptance.environment import Lab, a_while, eventually
from sublet import FailedTaskRunExceptionGroup, RunCancelledError, TaskRunRef

pytestmark = pytest.mark.real


async def release(lab: Lab, name: str, then: str = "return") -> TaskRunRef[Any, Any]:
    """A run that has given its slot away, and waits at the gate of its name."""
    run: TaskRunRef[Any, Any] = await lab.workflows.release.aio_run(
        lab.workflows.Release(name=name, then=then), wait_for_result=False
    )
    await lab.until_written("slot released", name=name)
    return run


async def the_only_slot_is_free(lab: Lab) -> bool:
    """Another task begins and ends on it."""
    return bool((await lab.workflows.double.aio_run(lab.workflows.Number(n=1))).n == 2)


async def test_the_next_tasks_run_while_the_first_goes_on_and_returns_its_result(lab: Lab) -> None:
    await lab.worker("release", "double", slots=1)
    run = await release(lab, "a")
    assert await the_only_slot_is_free(lab)
    assert await the_only_slot_is_free(lab)
    lab.ledger.open_gate("a")
    assert (await run.aio_result()).invocations == 1
    assert lab.ledger.count("release began") == 1


async def test_a_thread_can_release_its_slot(lab: Lab) -> None:
    await lab.worker("release_in_a_thread", "double", slots=1)
    run = await lab.workflows.release_in_a_thread.aio_run(lab.workflows.Named(name="a"), wait_for_result=False)
    await lab.until_written("slot released")
    assert await the_only_slot_is_free(lab)
    lab.ledger.open_gate("a")
    await run.aio_result()


async def test_many_tasks_that_released_their_slot_go_on_at_once(lab: Lab) -> None:
    await lab.worker("release", slots=1)
    runs = [await release(lab, name) for name in "abcde"]
    for name in "abcde":
        lab.ledger.open_gate(name)
    for run in runs:
        await run.aio_result()


async def test_a_second_release_does_nothing(lab: Lab) -> None:
    await lab.worker("release", "work", slots=1)
    run = await release(lab, "a", then="release again")
    named = lab.workflows.Named
    await lab.workflows.work.aio_run(named(name="holds the slot"), wait_for_result=False)
    await lab.until_written("work began", name="holds the slot")
    await lab.workflows.work.aio_run(named(name="waits"), wait_for_result=False)
    lab.ledger.open_gate("a")
    await run.aio_result()
    await a_while()
    assert lab.ledger.count("work began", name="waits") == 0, "the slot was released once, not twice"
    lab.ledger.open_gate("holds the slot")
    await lab.until_written("work began", name="waits")
    lab.ledger.open_gate("waits")


async def test_it_can_fail(lab: Lab) -> None:
    await lab.worker("release", "double", slots=1)
    run = await release(lab, "a", then="fail for good")
    lab.ledger.open_gate("a")
    with pytest.raises(FailedTaskRunExceptionGroup, match="no use"):
        await run.aio_result()
    assert lab.ledger.count("release began") == 1
    assert await the_only_slot_is_free(lab)


async def test_its_retry_takes_a_slot_again(lab: Lab) -> None:
    await lab.worker("release", "work", slots=1)
    run = await release(lab, "a", then="fail once")
    await lab.workflows.work.aio_run(lab.workflows.Named(name="holds the slot"), wait_for_result=False)
    await lab.until_written("work began", name="holds the slot")
    lab.ledger.open_gate("a")
    await a_while()
    assert lab.ledger.count("release began", name="a") == 1, "there is no slot for the second attempt"
    lab.ledger.open_gate("holds the slot")
    assert (await run.aio_result()).invocations == 2


async def test_it_can_time_out(lab: Lab) -> None:
    await lab.worker("release_for_too_long", "double", slots=1)
    run = await lab.workflows.release_for_too_long.aio_run(lab.workflows.Named(name="a"), wait_for_result=False)
    with pytest.raises(FailedTaskRunExceptionGroup, match="TimeoutError"):
        await run.aio_result()
    await lab.until_written("stopped", name="a")
    assert await the_only_slot_is_free(lab)


async def test_it_can_be_cancelled(lab: Lab) -> None:
    await lab.worker("release_for_too_long", "release", "double", slots=1)
    run = await release(lab, "a")
    await lab.client.runs.aio_cancel(run.workflow_run_id)
    with pytest.raises(RunCancelledError):
        await run.aio_result()
    assert await the_only_slot_is_free(lab)
    lab.ledger.open_gate("a")
    await a_while()
    assert (await lab.details(run.workflow_run_id)).run.status == "CANCELLED"


async def test_its_workers_death_makes_it_begin_elsewhere(lab: Lab) -> None:
    first = await lab.worker("release", slots=1)
    run = await release(lab, "a")
    lab.launch_worker("release", slots=1)
    first.kill()
    await lab.until_written("slot released", 2, name="a")
    lab.ledger.open_gate("a")
    result = await run.aio_result()
    assert result.invocations == 2
    assert len(set(lab.ledger.values("release began", "worker"))) == 2


async def test_a_worker_that_is_told_to_stop_finishes_what_released_its_slot(lab: Lab) -> None:
    worker = await lab.worker("release", slots=1)
    run = await release(lab, "a")
    worker.terminate()
    await eventually(lambda: not worker.ready, "the worker is leaving")
    lab.ledger.open_gate("a")
    assert (await run.aio_result()).invocations == 1
    assert worker.wait_for_end() == 0


async def test_a_durable_task_can_release_its_slot_and_then_wait(lab: Lab) -> None:
    await lab.worker("release_and_wait", "greet", durable_slots=1)
    run = await lab.workflows.release_and_wait.aio_run(lab.workflows.Named(name="a"), wait_for_result=False)
    await lab.until_written("slot released")
    await lab.workflows.greet.aio_run()
    lab.ledger.open_gate("a")
    await lab.until_evicted(run.workflow_run_id)
    await lab.workflows.greet.aio_run()
    await lab.client.event.aio_push("leave", {})
    assert (await run.aio_result()).invocations == 2
    await lab.workflows.greet.aio_run()
