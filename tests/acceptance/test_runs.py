"""Looking at runs, replaying them, and what goes in and comes out."""

from __future__ import annotations

import asyncio
from collections import defaultdict

import pytest

from acceptance.environment import Environment
from sublet import ClientConfig, FailedTaskRunExceptionGroup, Priority, RunNotFoundError, RunStatus, Sublet
from sublet_protocol.topology import run_key

pytestmark = pytest.mark.real

SHARDS = 4
"""As many as services have that are told nothing else."""


async def test_a_run_can_be_looked_at_while_it_waits_and_when_it_is_done(environment: Environment) -> None:
    await environment.worker("journey", "double", slots=1, durable_slots=1)
    environment.journal.open_gate("journey")
    run = await environment.workflows.journey.aio_run(
        environment.workflows.Named(name="x"), additional_metadata={"customer": "anna"}, wait_for_result=False
    )
    await environment.until_evicted(run.workflow_run_id)
    details = await environment.details(run.workflow_run_id)
    assert details.run.status == RunStatus.RUNNING
    assert details.run.input == {"name": "x"}
    assert details.run.additional_metadata == {"customer": "anna"}
    assert details.run.finished_at is None

    await environment.client.event.aio_push("answer", {"yes": True})
    result = await run.aio_result()
    assert (result.receipt, result.doubled, result.answer) == (1, 42, {"yes": True})
    details = await environment.details(run.workflow_run_id)
    assert (
        details.run.status == await environment.client.runs.aio_get_status(run.workflow_run_id) == RunStatus.COMPLETED
    )
    assert details.tasks[0].output is not None
    assert details.run.finished_at is not None
    assert await environment.client.runs.aio_get_result(run.workflow_run_id) == {
        "journey": result.model_dump(mode="json"),
    }


async def test_runs_are_found_by_workflow_status_and_metadata(environment: Environment) -> None:
    await environment.worker("double", "break_down", slots=1)
    number = environment.workflows.Number
    for colour in ("red", "red", "blue"):
        await environment.workflows.double.aio_run(number(n=1), additional_metadata={"colour": colour})
    with pytest.raises(FailedTaskRunExceptionGroup):
        await environment.workflows.break_down.aio_run()

    runs = environment.client.runs
    assert len((await runs.aio_list(workflow_ids=["double"])).rows) == 3
    assert len((await runs.aio_list(workflow_ids=["double"], additional_metadata={"colour": "red"})).rows) == 2
    (failed,) = (await runs.aio_list(workflow_ids=["double", "break_down"], statuses=[RunStatus.FAILED])).rows
    assert failed.error_message == "ValueError: the engine smokes"
    first, second = [(await runs.aio_list(workflow_ids=["double"], limit=2, offset=offset)).rows for offset in (0, 2)]
    assert (len(first), len(second)) == (2, 1)


async def test_another_program_gets_the_result_of_a_run_by_its_id(environment: Environment) -> None:
    await environment.worker("double", slots=1)
    run = await environment.workflows.double.aio_run(environment.workflows.Number(n=4), wait_for_result=False)
    other = Sublet(ClientConfig(amqp_url=environment.stack.rabbit.url, namespace=environment.namespace))
    try:
        assert await other.runs.aio_get_result(run.workflow_run_id) == {"double": {"n": 8}}
        stub = other.stubs.task(name="double", output_validator=environment.workflows.Number)
        assert await stub.aio_run({"n": 5}) == environment.workflows.Number(n=10)
        with pytest.raises(RunNotFoundError):
            await other.runs.aio_get_result("00000000-0000-0000-0000-000000000000")
    finally:
        await other.aio_close()


async def test_replaying_a_finished_durable_run_repeats_nothing_that_is_recorded(environment: Environment) -> None:
    await environment.worker("journey", "double", slots=1, durable_slots=1)
    environment.journal.open_gate("journey")
    run = await environment.workflows.journey.aio_run(wait_for_result=False)
    await environment.until_evicted(run.workflow_run_id)
    with pytest.raises(ValueError, match="only a finished run can be replayed"):
        await environment.client.runs.aio_replay(run.workflow_run_id)
    await environment.client.event.aio_push("answer", {"n": 1})
    before = await run.aio_result()

    await environment.client.runs.aio_replay(run.workflow_run_id)
    after = await run.aio_result()
    assert after.began_at == before.began_at
    assert after.answer == before.answer
    assert len(after.workers) > len(before.workers), "it did run again"
    assert environment.journal.count("charged") == environment.journal.count("doubled") == 1


async def test_replaying_a_failed_dag_runs_what_failed_and_what_comes_after_it(environment: Environment) -> None:
    await environment.worker("retrace", slots=1)
    run = await environment.workflows.retrace.aio_run(wait_for_result=False)
    with pytest.raises(FailedTaskRunExceptionGroup):
        await run.aio_result()
    environment.journal.open_gate("second step")
    await environment.client.runs.aio_replay(run.workflow_run_id)
    assert await run.aio_result() == {"first_step": {"n": 1}, "second_step": {"n": 2}, "third_step": {"n": 3}}
    assert environment.journal.values("step", "number") == [1, 2, 2, 3]


async def test_of_the_ready_tasks_of_a_shard_the_more_urgent_run_first_and_then_the_older(
    environment: Environment,
) -> None:
    await environment.worker("work", slots=1)
    work, named = environment.workflows.work, environment.workflows.Named
    await work.aio_run(named(name="first"), wait_for_result=False)
    await environment.until_written("work began", name="first")
    runs = {}
    for number, priority in enumerate([Priority.LOW, Priority.HIGH, Priority.MEDIUM] * 3):
        name = f"{Priority.HIGH - priority} {number}"
        environment.journal.open_gate(name)
        runs[name] = await work.aio_run(named(name=name), priority=priority, wait_for_result=False)
        await environment.details(runs[name].workflow_run_id)  # it has arrived
    environment.journal.open_gate("first")
    for run in runs.values():
        await run.aio_result()
    began: defaultdict[str, list[str]] = defaultdict(list)
    for name in environment.journal.values("work began", "name")[1:]:
        began[run_key(runs[name].workflow_run_id, SHARDS)].append(name)
    assert sum(map(len, began.values())) == len(runs)
    for names in began.values():
        assert names == sorted(names)


async def test_models_dataclasses_and_dictionaries_go_in_and_come_out_as_they_are(environment: Environment) -> None:
    await environment.worker("mirror_point", "mirror_dict", "mirror_anything", "double", slots=2)
    w = environment.workflows
    assert await w.double.aio_run(w.Number(n=3)) == w.Number(n=6)
    assert await w.mirror_point.aio_run(w.Point(1, 2)) == w.Point(2, 1)
    assert await w.mirror_dict.aio_run({"a": 1, "ü": [None, "x"]}) == {"ü": [None, "x"], "a": 1}
    assert await w.mirror_anything.aio_run({"free": "form"}) == {"free": "form"}
    assert await w.double.aio_run({"n": 3}) == w.Number(n=6)


async def test_programs_without_an_event_loop_run_and_wait_as_well(environment: Environment) -> None:
    await environment.worker("double", "work_in_a_thread", slots=2)
    w = environment.workflows

    def program() -> None:
        assert w.double.run(w.Number(n=2)).n == 4
        items = [w.double.create_bulk_run_item(w.Number(n=n)) for n in range(20)]
        assert [result.n for result in w.double.run_many(items)] == [2 * n for n in range(20)]
        run = w.work_in_a_thread.run(w.Named(name="sync"), wait_for_result=False)
        environment.journal.open_gate("sync")
        assert run.result().worker
        assert environment.client.runs.get_status(run.workflow_run_id) == RunStatus.COMPLETED

    await asyncio.to_thread(program)
