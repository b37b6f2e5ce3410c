"""RabbitMQ and MongoDB restart under load: no run is lost, and no task is done twice."""

from __future__ import annotations

import asyncio

import pytest

from acceptance.environment import Environment, eventually
from acceptance.stack import SERVICES, Stack
from chaos.durable_dag_load import assert_all_completed, start_runs
from sublet import RunStatus

pytestmark = pytest.mark.real

LOAD = 150


@pytest.mark.parametrize("server", ["rabbit", "mongo"])
@pytest.mark.parametrize("how", ["stopped", "killed"])
async def test_a_server_restarts_under_load(
    environment: Environment, mended_stack: Stack, server: str, how: str
) -> None:
    """While requests, tickets, claims, results, sleeps and children are in progress."""
    await environment.worker("durable_dag", "double", slots=8, durable_slots=8)
    runs = await start_runs(environment, LOAD)
    await environment.until_written("started", LOAD // 3)
    await asyncio.to_thread(_restart, mended_stack, server, how)
    runs |= await start_runs(environment, LOAD // 3, first=1_000)
    await assert_all_completed(environment, runs)


async def test_services_wait_for_a_server_that_is_down(environment: Environment, mended_stack: Stack) -> None:
    """MongoDB is down for longer than one attempt of the services lasts; a running task is not affected."""
    await environment.worker("work", "durable_dag", "double", slots=2, durable_slots=2)
    run = await environment.workflows.work.aio_run(environment.workflows.Named(name="a"), wait_for_result=False)
    await environment.until_written("work began")
    await asyncio.to_thread(mended_stack.mongo.kill)
    services = [mended_stack.the(service) for service in SERVICES]
    await eventually(lambda: not any(service.ready for service in services), "no service is ready")
    runs = await start_runs(environment, 20)
    environment.journal.open_gate("a")
    await environment.until_written("work ended")
    await asyncio.to_thread(mended_stack.mongo.start)
    await run.aio_result()
    await assert_all_completed(environment, runs)
    assert environment.journal.count("work began") == 1
    for service in services:
        service.wait_until_ready()


async def test_a_running_task_continues_while_the_broker_restarts(
    environment: Environment, mended_stack: Stack
) -> None:
    worker = await environment.worker("work", "release", slots=1)
    released = await environment.workflows.release.aio_run(
        environment.workflows.Release(name="released"), wait_for_result=False
    )
    await environment.until_written("slot released")
    run = await environment.workflows.work.aio_run(environment.workflows.Named(name="a"), wait_for_result=False)
    next_one = await environment.workflows.work.aio_run(environment.workflows.Named(name="b"), wait_for_result=False)
    await environment.until_written("work began", name="a")
    await asyncio.to_thread(mended_stack.rabbit.kill)
    await eventually(lambda: not worker.ready, "the worker is not ready")
    await asyncio.to_thread(mended_stack.rabbit.start)
    worker.wait_until_ready()
    assert (await environment.until_status(run.workflow_run_id, RunStatus.RUNNING)).tasks[0].retry_count == 0
    assert environment.journal.count("work began", name="b") == 0, (
        "the only slot is taken, even if its ticket was redelivered"
    )
    for name in ("a", "b", "released"):
        environment.journal.open_gate(name)
    for started in (run, next_one, released):
        await started.aio_result()
    assert environment.journal.values("work began", "name") == ["a", "b"]
    assert environment.journal.count("release began") == 1


def _restart(stack: Stack, server: str, how: str) -> None:
    process = stack.rabbit if server == "rabbit" else stack.mongo
    if how == "killed":
        process.kill()
    else:
        process.stop()
    process.start()
