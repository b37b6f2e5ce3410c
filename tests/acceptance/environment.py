"""What one test works with: a namespace of its own on a stack, workers, a journal, and any AMQP client's means."""

from __future__ import annotations

import asyncio
import importlib
import inspect
import os
import sys
import uuid
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import aio_pika
from deploy.localstack.paths import command

from acceptance.processes import Process
from acceptance.stack import Stack
from acceptance.task_journal import TaskJournal
from sublet import RunStatus, Sublet, WorkflowRunDetails
from sublet_protocol import ids
from sublet_protocol.messages import Record, encode
from sublet_protocol.topology import run_key
from support.polling import QUIET_S

PATIENCE_S = 90.0
LOOK_INTERVAL_S = 0.1
TESTS = Path(__file__).resolve().parents[1]
WORKFLOWS = "acceptance.workflows"


async def eventually(condition: Callable[[], Any | Awaitable[Any]], what: str, patience_s: float = PATIENCE_S) -> Any:
    """Returns what the condition gives as soon as that is true; fails when the patience is over."""
    try:
        async with asyncio.timeout(patience_s):
            while True:
                value = condition()
                if inspect.isawaitable(value):
                    value = await value
                if value:
                    return value
                await asyncio.sleep(LOOK_INTERVAL_S)
    except TimeoutError:
        raise AssertionError(f"within {patience_s:g} s it did not come true that {what}") from None


class Environment:
    """``workflows``: the module of the workflows under test, as a program in this lab's namespace imports it."""

    def __init__(self, stack: Stack, directory: Path) -> None:
        self.stack = stack
        self.journal = TaskJournal(directory)
        self.namespace = f"lab{uuid.uuid4().hex[:8]}_"
        self.variables = {"SUBLET_NAMESPACE": self.namespace, "SUBLET_TEST_JOURNAL": str(directory)}
        self._workers: list[Process] = []
        self.workflows = self._load_workflows()

    @property
    def client(self) -> Sublet:
        client: Sublet = self.workflows.client
        return client

    def close(self) -> None:
        for worker in self._workers:
            self.stack.forget(worker, grace_s=5.0)  # what a failed test left behind a gate would never end
        self.client.close()

    # --- workers ----------------------------------------------------------------------------------------------

    def launch_worker(
        self,
        *workflows: str,
        name: str = "worker",
        slots: int | None = None,
        durable_slots: int | None = None,
        app: str = "acceptance.app:worker",
        path: Path = TESTS,
        variables: dict[str, str] | None = None,
    ) -> Process:
        """``sublet-worker`` with these workflows; does not wait until it is ready. ``path``: where ``app`` is found."""
        settings = {
            "PYTHONPATH": os.pathsep.join([str(path), str(TESTS), os.environ.get("PYTHONPATH", "")]),
            "SUBLET_TEST_WORKER": name,
            "SUBLET_TEST_WORKFLOWS": ",".join(workflows),
            "SUBLET_TEST_SLOTS": str(slots or ""),
            "SUBLET_TEST_DURABLE_SLOTS": str(durable_slots or ""),
        }
        worker = self.stack.run(
            f"worker-{name}", [command("sublet-worker"), app], {**self.variables, **settings, **(variables or {})}
        )
        self._workers.append(worker)
        return worker

    async def worker(self, *workflows: str, **options: Any) -> Process:
        """As `launch_worker`, and waits until it takes work."""
        worker = self.launch_worker(*workflows, **options)
        await asyncio.to_thread(worker.wait_until_ready)
        return worker

    # --- runs -------------------------------------------------------------------------------------------------

    async def details(self, run_id: str) -> WorkflowRunDetails:
        return await self.client.runs.aio_get(run_id)

    async def until_evicted(self, run_id: str) -> None:
        async def evicted() -> bool:
            return any(task.is_evicted for task in (await self.details(run_id)).tasks)

        await eventually(evicted, f"run {run_id} waits without a slot")

    async def until_status(self, run_id: str, *statuses: str) -> WorkflowRunDetails:
        async def reached() -> WorkflowRunDetails | None:
            details = await self.details(run_id)
            return details if details.run.status in statuses else None

        found: WorkflowRunDetails = await eventually(reached, f"run {run_id} is {' or '.join(statuses)}")
        return found

    async def until_written(self, what: str, count: int = 1, **facts: Any) -> None:
        await eventually(
            lambda: self.journal.count(what, **facts) >= count, f"the journal has {count} of {what!r} {facts or ''}"
        )

    async def unfinished(self) -> list[str]:
        """The unfinished runs of this environment, for the report of a failed test."""
        rows = (await self.client.runs.aio_list(statuses=[RunStatus.QUEUED, RunStatus.RUNNING], limit=1_000)).rows
        ours = [row.metadata.id for row in rows if row.workflow_name.startswith(self.namespace)]
        return [f"{await self.details(run_id)!r}" for run_id in ours]

    # --- as any AMQP client can -------------------------------------------------------------------------------

    async def amqp(self) -> aio_pika.abc.AbstractConnection:
        return await aio_pika.connect(self.stack.broker.url)

    async def publish_event(self, key: str, body: bytes, **properties: Any) -> None:
        """Without the SDK. The key is given its namespace, as the workflows of this lab know it."""
        await self.publish("sublet.events", self.namespace + key, body, **properties)

    async def publish(self, exchange: str, routing_key: str, body: bytes, **properties: Any) -> None:
        async with await self.amqp() as connection:
            channel = await connection.channel()
            where = await channel.get_exchange(exchange) if exchange else channel.default_exchange
            await where.publish(aio_pika.Message(body, **properties), routing_key)

    async def report(self, *records: Record) -> None:
        """Send to the schedulers what a worker might: by the run of the first record's lease."""
        lease = getattr(records[0], "lease", "")
        await self.publish("sublet.requests", run_key(ids.run_of(lease)), encode(list(records)))

    async def dead_letter(self, marker: bytes) -> aio_pika.abc.AbstractIncomingMessage:
        """The dead letter whose body holds the marker; the others stay where they are."""
        async with await self.amqp() as connection:
            channel = await connection.channel()
            queue = await channel.get_queue("sublet.dead")
            found: list[aio_pika.abc.AbstractIncomingMessage] = []

            async def search() -> bool:
                while not found and (message := await queue.get(fail=False)):
                    found.extend([message] if marker in message.body else [])
                return bool(found)

            await eventually(search, f"a dead letter holds {marker[:60]!r}")
            return found[0]

    # --- inside -----------------------------------------------------------------------------------------------

    def _load_workflows(self) -> ModuleType:
        """Afresh: a client takes its settings from the environment when it is made."""
        for name in [name for name in sys.modules if name.startswith(WORKFLOWS)]:
            del sys.modules[name]
        with _environment(self.stack.variables | self.variables):
            return importlib.import_module(WORKFLOWS)


async def short_delay() -> None:
    """Long enough for what must not happen to happen, were it to; on a busy machine too."""
    await asyncio.sleep(5 * QUIET_S)


@contextmanager
def _environment(settings: dict[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(settings)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
