"""One worker runs a task of each kind, with and without its slot, when something happens to it or to its connection."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest

from acceptance.environment import Environment, eventually
from acceptance.processes import Process
from acceptance.stack import Stack
from sublet import TaskRunRef
from support.proxies import Proxy
from support.servers import LocalError, RabbitServer

pytestmark = pytest.mark.real

TASKS = ("work", "release", "durable_work", "release_and_wait", "double", "greet")
"""The last two show that the slots are free."""

IMPATIENCE_MS = 2_000


async def start_one_of_each(environment: Environment) -> list[TaskRunRef[Any, Any]]:
    """On a worker with one slot of each kind: those that give it away come first."""
    workflows, named = environment.workflows, environment.workflows.Named
    runs = [await workflows.release.aio_run(workflows.Release(name="released"), wait_for_result=False)]
    runs.append(await workflows.release_and_wait.aio_run(named(name="durable, released"), wait_for_result=False))
    await environment.until_written("slot released", 2)
    runs.append(await workflows.work.aio_run(named(name="ordinary"), wait_for_result=False))
    runs.append(await workflows.durable_work.aio_run(named(name="durable"), wait_for_result=False))
    await until_all_began(environment, 1)
    return runs


def beginnings(environment: Environment) -> list[int]:
    """How often each of them has begun."""
    return [
        environment.journal.count("release began"),
        environment.journal.count("slot released", name="durable, released"),
        environment.journal.count("work began"),
        environment.journal.count("durable work began"),
    ]


async def until_all_began(environment: Environment, times: int) -> None:
    await eventually(lambda: min(beginnings(environment)) >= times, f"all have begun {times} times")


async def finish(environment: Environment, runs: list[TaskRunRef[Any, Any]]) -> list[str]:
    """Let them all end. Which workers their results come from."""
    for name in ("released", "durable, released", "ordinary", "durable"):
        environment.journal.open_gate(name)
    await environment.client.event.aio_push("leave", {})
    results = await asyncio.gather(*(run.aio_result() for run in runs))
    await environment.workflows.double.aio_run(environment.workflows.Number(n=1))
    await environment.workflows.greet.aio_run()
    return [result.worker for result in results]


async def a_worker(environment: Environment, **variables: str) -> Process:
    """With one slot of each kind, so that the ones without a slot must have given it away."""
    return await environment.worker(*TASKS, slots=1, durable_slots=1, variables=variables)


async def its_successor(environment: Environment) -> Process:
    """With room for all of them in whatever order they come."""
    return await environment.worker(*TASKS, slots=2, durable_slots=2)


@contextlib.asynccontextmanager
async def cuttable(environment: Environment) -> AsyncIterator[tuple[Proxy, str]]:
    """A way to the broker that can be cut."""
    proxy = Proxy(environment.stack.rabbit.url)
    url = await proxy.start()
    try:
        yield proxy, url
    finally:
        await proxy.stop()


# --- its process ----------------------------------------------------------------------------------------------


async def kill(worker: Process) -> None:
    worker.kill()


async def signal_twice(worker: Process) -> None:
    worker.terminate()
    await eventually(lambda: not worker.ready, "the worker is leaving")
    worker.terminate()
    assert worker.wait_for_end() != 0


@pytest.mark.parametrize("end", [kill, signal_twice], ids=["it is killed", "a second signal comes"])
async def test_whatever_a_worker_ran_begins_elsewhere_when(
    environment: Environment, end: Callable[[Process], Any]
) -> None:
    first = await a_worker(environment)
    runs = await start_one_of_each(environment)
    await its_successor(environment)
    await end(first)
    await until_all_began(environment, 2)
    assert beginnings(environment) == [2, 2, 2, 2]
    assert len(set(await finish(environment, runs))) == 1


async def test_a_worker_that_stops_finishes_its_tasks_with_and_without_a_slot(
    environment: Environment,
) -> None:
    first = await a_worker(environment)
    runs = await start_one_of_each(environment)
    first.terminate()
    await eventually(lambda: not first.ready, "the worker is leaving")
    await its_successor(environment)
    await finish(environment, runs)
    assert first.wait_for_end() == 0
    assert beginnings(environment) == [1, 2, 1, 1], "the one that waited for an event in between came back"


# --- its connection -------------------------------------------------------------------------------------------


async def test_a_connection_that_is_soon_mended_costs_nothing(environment: Environment) -> None:
    async with cuttable(environment) as (proxy, url):
        worker = await a_worker(environment, SUBLET_AMQP_URL=url)
        runs = await start_one_of_each(environment)
        proxy.cut()
        await eventually(lambda: not worker.ready, "the worker has noticed")
        proxy.mend()
        await eventually(lambda: worker.ready, "the worker is back")
        assert beginnings(environment) == [1, 1, 1, 1]
        await finish(environment, runs)
        assert beginnings(environment) == [1, 2, 1, 1]
        worker.kill()  # without its connection it could not say goodbye


async def test_a_worker_without_a_connection_is_replaced_and_its_late_reports_are_ignored(
    environment: Environment,
) -> None:
    async with cuttable(environment) as (proxy, url):
        first = await a_worker(environment, SUBLET_AMQP_URL=url)
        runs = await start_one_of_each(environment)
        (cut_off,) = set(environment.journal.values("release began", "worker"))
        await its_successor(environment)
        proxy.cut()
        await until_all_began(environment, 2)
        proxy.mend()
        await eventually(lambda: first.ready, "the worker is back")
        assert cut_off not in await finish(environment, runs)
        first.kill()


@pytest.fixture
def impatient_broker(mended_stack: Stack) -> Iterator[None]:
    """Set a short acknowledgement timeout for new channels."""
    rabbit = mended_stack.rabbit
    settings = {"consumer_timeout": str(IMPATIENCE_MS), "channel_tick_interval": "500"}
    before = {name: rabbit.ctl("eval", f"element(2, application:get_env(rabbit, {name})).") for name in settings}
    _set(rabbit, settings)
    with contextlib.suppress(LocalError):  # only RabbitMQ 3.12 and newer ask the queue, and so know this
        policy = f'{{"consumer-timeout":{IMPATIENCE_MS}}}'
        rabbit.ctl("set_policy", "impatient", "^sublet[.]pool[.]", policy, "--apply-to", "queues")
    try:
        yield
    finally:
        with contextlib.suppress(LocalError):
            rabbit.ctl("clear_policy", "impatient")
        _set(rabbit, before)


def _set(rabbit: RabbitServer, settings: dict[str, str]) -> None:
    for name, value in settings.items():
        rabbit.ctl("eval", f"application:set_env(rabbit, {name}, {value.strip()}).")


@pytest.mark.usefixtures("impatient_broker")
async def test_a_broker_that_loses_patience_with_tickets_costs_nothing(environment: Environment) -> None:
    worker = await a_worker(environment)
    runs = await start_one_of_each(environment)
    await eventually(
        lambda: worker.log.read_text().count("lost the connection to RabbitMQ") >= 2,
        "it has closed their channel twice",
    )
    assert beginnings(environment) == [1, 1, 1, 1]
    await finish(environment, runs)
    assert beginnings(environment) == [1, 2, 1, 1]
