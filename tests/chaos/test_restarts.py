"""RabbitMQ and MongoDB restart under load: no run is lost, and no task is done twice."""

from __future__ import annotations

import asyncio

import pytest

from acceptance.environment import Lab, eventually
from acceptance.stack import SERVICES, Stack
from chaos.durable_dag_load import everybody_lands, sail
from sublet import RunStatus

pytestmark = pytest.mark.real

LOAD = 150


@pytest.mark.parametrize("server", ["rabbit", "mongo"])
@pytest.mark.parametrize("how", ["in good order", "by a power cut"])
async def test_a_server_restarts_under_load(lab: Lab, mended_stack: Stack, server: str, how: str) -> None:
    """Of everything that is under way: requests, tickets, claims, results, sleeps, children."""
    await lab.worker("voyage", "double", slots=8, durable_slots=8)
    runs = await sail(lab, LOAD)
    await lab.until_written("embarked", LOAD // 3)
    await asyncio.to_thread(_restart, mended_stack, server, how)
    runs |= await sail(lab, LOAD // 3, first=1_000)
    await everybody_lands(lab, runs)


async def test_a_server_that_stays_away_is_waited_for(lab: Lab, mended_stack: Stack) -> None:
    """MongoDB is away for longer than the services try at once; a task that works goes on all the while."""
    await lab.worker("work", "voyage", "double", slots=2, durable_slots=2)
    run = await lab.workflows.work.aio_run(lab.workflows.Named(name="a"), wait_for_result=False)
    await lab.until_written("work began")
    await asyncio.to_thread(mended_stack.mongo.kill)
    services = [mended_stack.the(service) for service in SERVICES]
    await eventually(lambda: not any(service.ready for service in services), "the services say that they are cut off")
    runs = await sail(lab, 20)
    lab.ledger.open_gate("a")
    await lab.until_written("work ended")
    await asyncio.to_thread(mended_stack.mongo.start)
    await run.aio_result()
    await everybody_lands(lab, runs)
    assert lab.ledger.count("work began") == 1
    for service in services:
        service.wait_until_ready()


async def test_a_working_task_goes_on_while_the_broker_restarts(lab: Lab, mended_stack: Stack) -> None:
    worker = await lab.worker("work", "release", slots=1)
    released = await lab.workflows.release.aio_run(lab.workflows.Release(name="released"), wait_for_result=False)
    await lab.until_written("slot released")
    run = await lab.workflows.work.aio_run(lab.workflows.Named(name="a"), wait_for_result=False)
    next_one = await lab.workflows.work.aio_run(lab.workflows.Named(name="b"), wait_for_result=False)
    await lab.until_written("work began", name="a")
    await asyncio.to_thread(mended_stack.rabbit.kill)
    await eventually(lambda: not worker.ready, "the worker says that it is cut off")
    await asyncio.to_thread(mended_stack.rabbit.start)
    worker.wait_until_ready()
    assert (await lab.until_status(run.workflow_run_id, RunStatus.RUNNING)).tasks[0].retry_count == 0
    assert lab.ledger.count("work began", name="b") == 0, "the only slot is taken, whatever became of its ticket"
    for name in ("a", "b", "released"):
        lab.ledger.open_gate(name)
    for each in (run, next_one, released):
        await each.aio_result()
    assert lab.ledger.values("work began", "name") == ["a", "b"]
    assert lab.ledger.count("release began") == 1


def _restart(stack: Stack, server: str, how: str) -> None:
    process = stack.rabbit if server == "rabbit" else stack.mongo
    if how == "by a power cut":
        process.kill()
    else:
        process.stop()
    process.start()
