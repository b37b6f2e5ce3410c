"""Run requests in a scheduler: which runs and definitions it loads from the store."""

from __future__ import annotations

from collections.abc import AsyncIterator

import msgspec
import pytest

from sublet_engine.run import transitions
from sublet_engine.run.effects import Effects
from sublet_platform.memory import MemoryBroker, MemoryCluster, MemoryDatabase, MemoryRunStore
from sublet_platform.metrics import ServiceMetrics
from sublet_platform.ports import Delivery, Outgoing
from sublet_protocol import limits
from sublet_protocol.messages import CancelRun, ParentLink, RunRequest, RunResult, decode_for_client, encode
from sublet_protocol.topology import DEAD, REQUESTS, run_key, topology
from sublet_scheduler.metrics import SchedulerMetrics
from sublet_scheduler.scheduler import Scheduler
from support.clocks import ManualClock
from support.engine_builders import workflow
from support.polling import until

INBOX = "sublet.inbox.client.test"


class SchedulerHarness:
    """A scheduler of one shard, and a client. The workflow is unknown, so every run fails at once."""

    def __init__(self) -> None:
        self.clock, self.database, self.cluster = ManualClock(), MemoryDatabase(), MemoryCluster()
        self.cluster.declare(topology(1))
        self.broker = MemoryBroker(self.cluster)
        self.results: dict[str, RunResult] = {}
        self.looks = 0
        self.database.before = self._notice
        self._numbers = iter(range(1_000))
        metrics = ServiceMetrics()
        self.scheduler = Scheduler(
            scheduler_id="scheduler",
            shards=1,
            store=MemoryRunStore(self.database, self.clock),
            broker=MemoryBroker(self.cluster),
            clock=self.clock,
            new_id=lambda: f"id-{next(self._numbers)}",
            metrics=metrics,
            scheduler_metrics=SchedulerMetrics(metrics),
        )

    async def start(self) -> None:
        await self.scheduler.start()
        await self.broker.open_inbox(INBOX, self._take)

    async def _notice(self, operation: str) -> None:
        self.looks += operation == "load_runs"

    def _take(self, delivery: Delivery) -> None:
        for result in decode_for_client(delivery.body):
            if isinstance(result, RunResult):
                self.results[result.run_id] = result

    async def save(self, name: str) -> None:
        """Save a definition, as an owner does when a worker registers it."""
        await MemoryRunStore(self.database, self.clock).save_workflow(workflow("task", name=name), self.clock.now())

    async def request(self, run_id: str, parent: ParentLink | None = None) -> RunResult:
        """Request a run. Returns its result."""
        request = RunRequest(run_id, "unknown", reply_to=INBOX, parent=parent, notify_parent=False)
        await self.broker.publish([Outgoing(REQUESTS, run_key(run_id), encode([request]))])
        await until(lambda: run_id in self.results, "the result")
        return self.results[run_id]


@pytest.fixture
async def harness() -> AsyncIterator[SchedulerHarness]:
    harness = SchedulerHarness()
    await harness.start()
    yield harness
    await harness.scheduler.stop()


async def test_a_new_owner_loads_every_requested_run(harness: SchedulerHarness) -> None:
    await harness.request("run-1")
    assert harness.looks == 1


async def test_an_owner_does_not_load_a_run_that_is_requested_under_a_random_id(harness: SchedulerHarness) -> None:
    await harness.request("run-1")
    harness.clock.advance(limits.REQUEST_REPEATED_S + 1)
    await harness.request("run-2")
    assert harness.looks == 1
    await harness.request("run-3", parent=ParentLink("run-0.task"))
    assert harness.looks == 2


async def test_a_run_that_is_stored_after_all_is_loaded_and_not_overwritten(harness: SchedulerHarness) -> None:
    await harness.request("run-1")
    harness.clock.advance(limits.REQUEST_REPEATED_S + 1)
    other = msgspec.structs.replace(
        harness.database.runs["run-1"], id="run-2", workflow="another", owner_term="another"
    )
    harness.database.runs["run-2"] = other
    result = await harness.request("run-2")
    assert result.status == "FAILED"
    assert harness.database.runs["run-2"].workflow == "another"


async def test_a_workflow_saved_by_another_owner_is_known(harness: SchedulerHarness) -> None:
    await harness.request("run-1")  # builds the shard, without the workflow
    await harness.save("flow")
    await harness.broker.publish([Outgoing(REQUESTS, "bucket.00", encode([RunRequest("run-2", "flow")]))])
    await until(lambda: "run-2" in harness.database.runs, "the run")
    assert harness.database.runs["run-2"].status == "QUEUED"


async def test_a_run_that_another_owner_began_with_a_new_definition_continues(harness: SchedulerHarness) -> None:
    await harness.request("run-1")
    await harness.save("flow")
    spec = workflow("task", name="flow")
    begun = transitions.create(RunRequest("run-2", "flow"), spec, Effects(harness.clock.now(), "another"))
    harness.database.runs["run-2"] = msgspec.structs.replace(begun, revision=1, owner_term="another")
    await harness.broker.publish([Outgoing(REQUESTS, "bucket.00", encode([CancelRun("run-2")]))])
    await until(lambda: harness.database.runs["run-2"].terminal, "the end of the run")
    assert harness.database.runs["run-2"].status == "CANCELLED"
    assert not harness.cluster.queues[DEAD].ready
