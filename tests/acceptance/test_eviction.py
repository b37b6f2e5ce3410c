"""A durable task gives its slot away whenever it waits, and goes on wherever there is room."""

from __future__ import annotations

import pytest

from acceptance.environment import Environment, short_delay
from sublet import BulkCancelReplayOpts, RunStatus

pytestmark = pytest.mark.real


async def test_a_thousand_tasks_sleep_at_once_on_one_durable_slot_and_one_more_runs(environment: Environment) -> None:
    await environment.worker("nap", "greet", durable_slots=1)
    nap = environment.workflows.nap
    items = [nap.create_bulk_run_item(environment.workflows.Nap(seconds=3_600, name=str(i))) for i in range(1_000)]
    sleepers = await nap.aio_run_many(items, wait_for_result=False)
    await environment.until_written("nap began", 1_000)

    await environment.workflows.greet.aio_run()

    assert environment.journal.count("nap began") == 1_000
    assert environment.journal.count("nap ended") == 0
    run_ids = [sleeper.workflow_run_id for sleeper in sleepers]
    await environment.client.runs.aio_bulk_cancel(BulkCancelReplayOpts(ids=run_ids))
    assert (await environment.details(run_ids[-1])).run.status == RunStatus.CANCELLED


async def test_sleepers_that_wake_together_share_one_durable_slot(environment: Environment) -> None:
    await environment.worker("nap", durable_slots=1)
    nap = environment.workflows.nap
    items = [nap.create_bulk_run_item(environment.workflows.Nap(seconds=2, name=str(i))) for i in range(200)]
    results = await nap.aio_run_many(items)
    assert [result.invocations for result in results] == [2] * 200


async def test_every_kind_of_wait_returns_its_documented_result(environment: Environment) -> None:
    await environment.worker("clockwork", durable_slots=1)
    result = await environment.workflows.clockwork.aio_run()
    assert result.same_moment, "aio_now gives the same moment at every replay"
    assert result.moments_differ, "two calls of aio_now are two moments"
    assert result.nothing is None
    assert result.both == ["long", "short"]
    assert result.either == ["soon"]
    assert result.slept_s <= 1
    assert environment.journal.count("nothing computed") == 1


async def test_durable_and_ordinary_tasks_never_take_each_others_slots(environment: Environment) -> None:
    await environment.worker("work", "durable_work", slots=1, durable_slots=1)
    work, durable_work, named = (
        environment.workflows.work,
        environment.workflows.durable_work,
        environment.workflows.Named,
    )
    await work.aio_run(named(name="first"), wait_for_result=False)
    await durable_work.aio_run(named(name="durable first"), wait_for_result=False)
    await environment.until_written("work began", name="first")
    await environment.until_written("durable work began", name="durable first")
    second = await work.aio_run(named(name="second"), wait_for_result=False)
    durable_second = await durable_work.aio_run(named(name="durable second"), wait_for_result=False)
    environment.journal.open_gate("second")
    environment.journal.open_gate("durable second")

    environment.journal.open_gate("durable first")
    await durable_second.aio_result()
    await short_delay()
    assert environment.journal.count("work began", name="second") == 0, (
        "the durable slot is free, but not for an ordinary task"
    )

    durable_third = await durable_work.aio_run(named(name="durable third"), wait_for_result=False)
    await environment.until_written("durable work began", name="durable third")
    await durable_work.aio_run(named(name="durable fourth"), wait_for_result=False)
    environment.journal.open_gate("first")
    await second.aio_result()
    await short_delay()
    assert environment.journal.count("durable work began", name="durable fourth") == 0
    environment.journal.open_gate("durable fourth")
    environment.journal.open_gate("durable third")
    await durable_third.aio_result()


async def test_a_task_without_an_eviction_policy_stays_on_its_worker(environment: Environment) -> None:
    await environment.worker("stay", durable_slots=2)
    run = await environment.workflows.stay.aio_run(environment.workflows.Named(name="me"), wait_for_result=False)
    await environment.until_written("stay invoked")
    await short_delay()
    (task,) = (await environment.details(run.workflow_run_id)).tasks
    assert not task.is_evicted
    await environment.client.event.aio_push("leave", {"name": "me"})
    assert (await run.aio_result()).invocations == 1


async def test_a_task_leaves_early_when_others_need_its_slot(environment: Environment) -> None:
    await environment.worker("make_way", durable_slots=1)
    make_way, named = environment.workflows.make_way, environment.workflows.Named
    first = await make_way.aio_run(named(name="first"), wait_for_result=False)
    await environment.until_written("make way invoked", name="first")
    second = await make_way.aio_run(named(name="second"), wait_for_result=False)
    await environment.until_written("make way invoked", name="second")
    await environment.client.event.aio_push("leave", {"name": "first"})
    assert (await first.aio_result()).invocations == 2
    await environment.client.event.aio_push("leave", {"name": "second"})
    await second.aio_result()


async def test_code_that_catches_its_own_eviction_is_not_believed(environment: Environment) -> None:
    await environment.worker("stubborn", durable_slots=1)
    run = await environment.workflows.stubborn.aio_run(wait_for_result=False)
    await environment.until_written("stubborn caught")
    await environment.until_evicted(run.workflow_run_id)
    await environment.client.event.aio_push("leave", {})
    assert await run.aio_result() == {"result": "the truth"}


@pytest.mark.parametrize("workflow", ["gathered", "grouped"])
async def test_branches_go_on_in_the_order_in_which_their_waits_ended_at_every_replay(
    environment: Environment, workflow: str
) -> None:
    await environment.worker(workflow, durable_slots=1)
    run = await getattr(environment.workflows, workflow).aio_run(wait_for_result=False)
    await environment.until_evicted(run.workflow_run_id)
    for number, name in enumerate("cab", start=1):
        await environment.client.event.aio_push("branch", {"name": name})
        await environment.until_written("charged", number)
    assert await run.aio_result() == {"order": ["c", "a", "b"]}
    orders = environment.journal.values("branches went on", "order")
    assert all(order == list("cab")[: len(order)] for order in orders), orders
    assert environment.journal.values("charged", "name") == ["c", "a", "b"]


async def test_a_branch_that_works_is_never_killed_by_one_that_waits(environment: Environment) -> None:
    await environment.worker("half_busy", durable_slots=1)
    run = await environment.workflows.half_busy.aio_run(wait_for_result=False)
    await environment.until_written("toil began")
    await short_delay()
    await environment.client.event.aio_push("call", {})
    await environment.until_written("call heard")
    assert environment.journal.count("toil ended") == 0
    environment.journal.open_gate("toil")
    assert (await run.aio_result()).invocations == 1
    assert environment.journal.count("toil began") == 1
