"""Parents wait for their children without a slot."""

from __future__ import annotations

import pytest

from acceptance.environment import Environment
from sublet import RunStatus

pytestmark = pytest.mark.real


async def test_a_parent_on_one_durable_slot_fans_out_to_a_thousand_children_on_one_slot(
    environment: Environment,
) -> None:
    await environment.worker("fan_out", "double", slots=1, durable_slots=1)
    result = await environment.workflows.fan_out.aio_run(environment.workflows.Number(n=1_000))
    assert result.n == sum(2 * i for i in range(1_000))
    assert sorted(environment.journal.values("doubled", "n")) == list(range(1_000)), "every child ran once"


async def test_children_of_every_fate_answer_to_their_parent(environment: Environment) -> None:
    await environment.worker("family", "double", "break_down", "pair", slots=2, durable_slots=1)
    result = await environment.workflows.family.aio_run()
    assert result.failure == result.failure_again == "ValueError: the engine smokes"
    assert result.pair == {"left": {"n": 2}, "right": {"n": 20}}
    assert result.twins == 1, "children with one key are one child"
    assert result.mixed == ["Number", "TaskRunError"]
    assert await environment.client.runs.aio_get_result(result.left_alone) == {"double": {"n": 8}}
    assert environment.journal.count("broke down") == 3


async def test_a_child_that_is_cancelled_wakes_its_parent_with_an_error(environment: Environment) -> None:
    await environment.worker("guardian", "work", slots=1, durable_slots=1)
    run = await environment.workflows.guardian.aio_run(wait_for_result=False)
    await environment.until_written("work began", name="ward")
    await environment.until_evicted(run.workflow_run_id)
    parent = (await environment.details(run.workflow_run_id)).tasks[0].task_external_id
    (child,) = (await environment.client.runs.aio_list(parent_task_external_id=parent)).rows
    await environment.client.runs.aio_cancel(child.metadata.id)
    assert await run.aio_result() == {"ended": "ChildCancelled"}


async def test_a_child_of_an_unknown_workflow_is_an_error_for_its_parent_and_no_endless_wait(
    environment: Environment,
) -> None:
    await environment.worker("guardian", durable_slots=1)
    assert await environment.workflows.guardian.aio_run() == {"ended": "UnknownWorkflow"}


async def test_a_child_of_a_cancelled_parent_goes_on_in_peace(environment: Environment) -> None:
    await environment.worker("guardian", "work", slots=1, durable_slots=1)
    run = await environment.workflows.guardian.aio_run(wait_for_result=False)
    await environment.until_written("work began", name="ward")
    await environment.until_evicted(run.workflow_run_id)
    parent = (await environment.details(run.workflow_run_id)).tasks[0].task_external_id
    (child,) = (await environment.client.runs.aio_list(parent_task_external_id=parent)).rows
    await environment.client.runs.aio_cancel(run.workflow_run_id)
    await environment.until_status(run.workflow_run_id, RunStatus.CANCELLED)
    environment.journal.open_gate("ward")
    await environment.until_status(child.metadata.id, RunStatus.COMPLETED)
    assert (await environment.details(run.workflow_run_id)).run.status == RunStatus.CANCELLED


@pytest.mark.parametrize(("parent", "children"), [("foster", [1, 2, 3]), ("foster_in_a_thread", [1, 2])])
async def test_a_second_attempt_of_an_ordinary_parent_finds_the_children_of_the_first(
    environment: Environment, parent: str, children: list[int]
) -> None:
    await environment.worker(parent, "double", slots=2)
    assert await getattr(environment.workflows, parent).aio_run() == {"found": [2 * n for n in children]}
    assert sorted(environment.journal.values("doubled", "n")) == children
