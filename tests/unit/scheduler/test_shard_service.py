"""Requests for runs, as a scheduler takes them: which runs and definitions it looks for in the store."""

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


class TaskServices:
    """A scheduler of one shard, and a client. The workflow is unknown, so that every run ends as it begins."""

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
        """As an owner does to whom a worker has introduced itself."""
        await MemoryRunStore(self.database, self.clock).save_workflow(workflow("task", name=name), self.clock.now())

    async def request(self, run_id: str, parent: ParentLink | None = None) -> RunResult:
        """How the run ended."""
        request = RunRequest(run_id, "unknown", reply_to=INBOX, parent=parent, notify_parent=False)
        await self.broker.publish([Outgoing(REQUESTS, run_key(run_id), encode([request]))])
        await until(lambda: run_id in self.results, "the result")
        return self.results[run_id]


@pytest.fixture
async def desk() -> AsyncIterator[TaskServices]:
    desk = TaskServices()
    await desk.start()
    yield desk
    await desk.scheduler.stop()


async def test_a_new_owner_looks_for_every_requested_run(desk: TaskServices) -> None:
    await desk.request("run-1")
    assert desk.looks == 1


async def test_a_request_under_a_random_id_is_looked_for_by_no_settled_owner(desk: TaskServices) -> None:
    await desk.request("run-1")
    desk.clock.advance(limits.REQUEST_REPEATED_S + 1)
    await desk.request("run-2")
    assert desk.looks == 1
    await desk.request("run-3", parent=ParentLink("run-0.task"))
    assert desk.looks == 2


async def test_a_run_that_is_stored_after_all_is_found_and_not_written_over(desk: TaskServices) -> None:
    await desk.request("run-1")
    desk.clock.advance(limits.REQUEST_REPEATED_S + 1)
    other = msgspec.structs.replace(desk.database.runs["run-1"], id="run-2", workflow="another", owner_term="another")
    desk.database.runs["run-2"] = other
    result = await desk.request("run-2")
    assert result.status == "FAILED"
    assert desk.database.runs["run-2"].workflow == "another"


async def test_a_workflow_that_another_owner_saved_is_not_unknown(desk: TaskServices) -> None:
    await desk.request("run-1")  # builds the shard, without the workflow
    await desk.save("flow")
    await desk.broker.publish([Outgoing(REQUESTS, "bucket.00", encode([RunRequest("run-2", "flow")]))])
    await until(lambda: "run-2" in desk.database.runs, "the run")
    assert desk.database.runs["run-2"].status == "QUEUED"


async def test_a_run_that_another_owner_began_with_its_own_definition_is_carried_on(desk: TaskServices) -> None:
    await desk.request("run-1")
    await desk.save("flow")
    spec = workflow("task", name="flow")
    begun = transitions.create(RunRequest("run-2", "flow"), spec, Effects(desk.clock.now(), "another"))
    desk.database.runs["run-2"] = msgspec.structs.replace(begun, revision=1, owner_term="another")
    await desk.broker.publish([Outgoing(REQUESTS, "bucket.00", encode([CancelRun("run-2")]))])
    await until(lambda: desk.database.runs["run-2"].terminal, "the end of the run")
    assert desk.database.runs["run-2"].status == "CANCELLED"
    assert not desk.cluster.queues[DEAD].ready
