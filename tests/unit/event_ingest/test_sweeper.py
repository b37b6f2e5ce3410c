"""The sweeper removes subscriptions that no task waits for, and no others."""

from __future__ import annotations

import asyncio

import pytest
from msgspec.structs import replace

from sublet_engine.run.completion import DAG_WAIT
from sublet_engine.run.state import OpenWait, Run, TaskRun
from sublet_event_ingest import sweeper as sweeper_module
from sublet_event_ingest.sweeper import SUBSCRIPTION_SWEEP_INTERVAL_S
from sublet_platform.ports import StoredSubscription, StoreUnavailable
from sublet_protocol.specs import EventCondition
from support.ingest_harness import IngestHarness, Instance, settled, wait
from support.virtual_time import EPOCH_S, in_virtual_time

PAID = EventCondition("c", "paid")
EVICTED = TaskRun("t", "EVICTED", open_waits=(OpenWait("1", groups=((PAID,),)),))


def store(harness: IngestHarness, name: str, *, operation_id: str = "1") -> str:
    """Store a subscription of the task ``t`` of the run ``name``. Returns its id."""
    asked = replace(wait(name), operation_id=operation_id)
    harness.database.subscriptions[asked.id] = StoredSubscription(asked.id, "key", asked)
    return asked.id


def begin(harness: IngestHarness, name: str, task: TaskRun) -> None:
    harness.database.runs[name] = Run(name, "w", "1", "{}", EPOCH_S, tasks=(task,))


def anomalies(instance: Instance) -> float:
    return instance.value("sublet_sweeper_anomalies_total", sweeper="subscriptions") or 0.0


@in_virtual_time
async def test_the_subscription_of_a_waiting_task_stays() -> None:
    harness, [instance] = await IngestHarness.begin()
    begin(harness, "durable", EVICTED)
    store(harness, "durable")
    begin(harness, "dag", TaskRun("t"))
    store(harness, "dag", operation_id=DAG_WAIT)
    await settled(instance, seconds=5 * SUBSCRIPTION_SWEEP_INTERVAL_S)
    assert len(harness.database.subscriptions) == 2
    assert anomalies(instance) == 0


@pytest.mark.parametrize(
    ("task", "operation_id"),
    [
        pytest.param(None, "1", id="its run is not there"),
        pytest.param(TaskRun("other"), "1", id="its run has no such task"),
        pytest.param(TaskRun("t", "CANCELLED", open_waits=EVICTED.open_waits), "1", id="its task has ended"),
        pytest.param(TaskRun("t", "EVICTED"), "1", id="its wait is over"),
        pytest.param(
            TaskRun("t", "EVICTED", open_waits=(OpenWait("1", ((PAID,),), met=(("c", "{}"),)),)),
            "1",
            id="it came true",
        ),
        pytest.param(TaskRun("t", "EVICTED", replays=1, open_waits=EVICTED.open_waits), "1", id="its task is replayed"),
        pytest.param(TaskRun("t", "RUNNING"), DAG_WAIT, id="its task has begun"),
        pytest.param(TaskRun("t", met=("c",)), DAG_WAIT, id="its condition is met"),
    ],
)
@in_virtual_time
async def test_a_subscription_without_a_wait_is_removed_and_counted_as_an_anomaly(
    task: TaskRun | None, operation_id: str
) -> None:
    harness, [instance] = await IngestHarness.begin()
    if task is not None:
        begin(harness, "gone", task)
    store(harness, "gone", operation_id=operation_id)
    await settled(instance, seconds=3 * SUBSCRIPTION_SWEEP_INTERVAL_S)
    assert harness.database.subscriptions == {}
    assert anomalies(instance) == 1


@in_virtual_time
async def test_a_subscription_deleted_meanwhile_is_not_counted_as_an_anomaly() -> None:
    harness, [instance] = await IngestHarness.begin()
    left = store(harness, "gone")
    await asyncio.sleep(1.5 * SUBSCRIPTION_SWEEP_INTERVAL_S)
    assert left in harness.database.subscriptions
    del harness.database.subscriptions[left]
    await settled(instance, seconds=3 * SUBSCRIPTION_SWEEP_INTERVAL_S)
    assert anomalies(instance) == 0


@in_virtual_time
async def test_all_pages_are_swept_repeatedly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweeper_module, "SWEEP_PAGE", 2)
    harness, [instance] = await IngestHarness.begin()
    for name in ("b", "d", "f"):
        begin(harness, name, EVICTED)
    waited_for = {store(harness, name) for name in ("b", "d", "f")}
    for name in ("a", "e", "g", "h"):
        store(harness, name)
    await asyncio.sleep(10 * SUBSCRIPTION_SWEEP_INTERVAL_S)
    assert set(harness.database.subscriptions) == waited_for
    store(harness, "c")
    await settled(instance, seconds=10 * SUBSCRIPTION_SWEEP_INTERVAL_S)
    assert set(harness.database.subscriptions) == waited_for
    assert anomalies(instance) == 5


@in_virtual_time
async def test_a_database_that_does_not_answer_only_delays_the_sweep() -> None:
    harness, [instance] = await IngestHarness.begin()
    store(harness, "gone")

    async def refuse(operation: str) -> None:
        raise StoreUnavailable(operation)

    before, harness.database.before = harness.database.before, refuse
    await asyncio.sleep(3 * SUBSCRIPTION_SWEEP_INTERVAL_S)
    harness.database.before = before
    assert instance.service.alive
    await settled(instance, seconds=3 * SUBSCRIPTION_SWEEP_INTERVAL_S)
    assert harness.database.subscriptions == {}
