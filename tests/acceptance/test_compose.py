"""The containers of `docker-compose.yml`. They need Docker and minutes: set SUBLET_TEST_COMPOSE=1 to run them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator

import pytest

from acceptance.compose import Compose, kill
from acceptance.demo import assert_all_checks_passed, run_demo
from acceptance.prometheus import ONLY_IN_TROUBLE, Prometheus, every_panel_draws
from sublet import ClientConfig, Sublet

pytestmark = [pytest.mark.tries("compose"), pytest.mark.timeout(1_200)]


@pytest.fixture(scope="module")
def compose() -> Iterator[Compose]:
    containers = Compose()
    try:
        containers.up("--build")
        yield containers
    finally:
        containers.do("down", "--volumes", "--timeout", "10")


async def test_the_demo_passes_and_every_dashboard_panel_has_data(compose: Compose) -> None:
    since = time.time()
    assert_all_checks_passed(await asyncio.to_thread(run_demo, {"SUBLET_AMQP_URL": compose.amqp_url("sublet-worker")}))
    await every_panel_draws(Prometheus(compose.prometheus_url), since, "1m", without=ONLY_IN_TROUBLE)


async def test_no_run_is_lost_when_containers_of_scaled_services_are_killed(compose: Compose) -> None:
    scale = ("--scale", "scheduler=2", "--scale", "worker=3")
    await asyncio.to_thread(compose.up, *scale)
    client = Sublet(ClientConfig(amqp_url=compose.amqp_url("sublet-worker")))
    nap, fan_out = (
        client.stubs.task(name=name, input_validator=dict, output_validator=dict) for name in ("nap", "sum_of_squares")
    )
    naps = await nap.aio_run_many([nap.create_bulk_run_item({"seconds": 10})] * 100, wait_for_result=False)
    total = await fan_out.aio_run({"children": 500}, wait_for_result=False)
    await asyncio.to_thread(kill, "scheduler-1", "worker-1")
    assert (await total.aio_result())["value"] == sum(n**2 for n in range(500))
    assert len(await asyncio.gather(*(run.aio_result() for run in naps))) == 100
    await client.aio_close()
    await asyncio.to_thread(compose.up, *scale)
    assert compose.states("scheduler") == ["running"] * 2
    assert compose.states("worker") == ["running"] * 3
