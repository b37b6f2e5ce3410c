"""The audit after a turmoil: whether what the servers, the services and the ledger hold fits what was submitted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from acceptance.environment import Environment, eventually
from acceptance.leak_checks import find_leaks
from acceptance.processes import Process
from acceptance.stack import SERVICES
from sublet_platform.mongo.client import connect
from sublet_platform.settings import ServiceSettings
from sublet_protocol.topology import DEAD

ANOMALIES = "sublet_sweeper_anomalies_total"
SETTLE_S = 200.0
"""For the last timers to be forgotten and the last tickets to be acknowledged; a subscription that nobody waits for is
looked at twice, a minute apart."""

EFFECTS = {
    ("durable_dag", "embark"): "started",
    ("durable_dag", "start_runs"): "sailed",
    ("durable_dag", "land"): "landed",
    ("double", "double"): "doubled",
    ("stumble", "stumble"): "charged",
    ("release", "release"): "release began",
}
"""What each task writes into the ledger, once for each time that it is done."""

AGAIN_WITH_EACH_RETRY = frozenset(("release began",))
"""All others are of tasks without retries, or recorded in the durable log."""

EXPLAINED_BY: Mapping[str, frozenset[str]] = {
    "ticket_lost": frozenset(("rabbitmq", "scheduler", "worker")),
    "grant_unseen": frozenset(("rabbitmq", "scheduler", "worker")),
    "result_unseen": frozenset(("rabbitmq", "scheduler", "worker")),
    "timers": frozenset(("timer", "mongodb")),
    "subscriptions": frozenset(("event-ingest", "rabbitmq")),
}
"""What must have been struck for a sweeper to find something: who holds a hint that dies with him."""


class Audit:
    """``struck`` is told of every blow, because it explains what sweepers find and why something was done twice."""

    def __init__(self, environment: Environment) -> None:
        self._environment = environment
        self._struck: set[str] = set()
        self._found: Counter[str] = Counter()
        self._dead_before = 0
        self._found_before: Counter[str] = Counter()
        self._losses = 0

    def __repr__(self) -> str:
        """What sweepers found, and how often a worker was lost: the price of the blows."""
        return f"sweepers found {dict(self._all_found()) or 'nothing'}, {self._losses} tasks lost their worker"

    async def begin(self) -> None:
        """What others have left on this stack is none of ours."""
        self._dead_before = await self._dead_letters()
        self._found_before = self._anomalies()

    def struck(self, kind: str, process: Process | None = None) -> None:
        """Before it is. A process that dies takes with it what its sweepers have counted."""
        self._struck.add(kind)
        if process is not None:
            self._found += process.metric_by("sweeper", FINDINGS)

    async def pass_(self, submitted: Mapping[str, int]) -> None:
        """Everything that was submitted, by workflow, has ended once, and left nothing behind.

        Raises:
            AssertionError: with all that does not fit.
        """
        complaints: list[str] = ["not looked yet"]

        async def all_is_well() -> bool:
            complaints[:] = [*await self._of_runs(submitted), *await self._of_leftovers()]
            return not complaints

        try:
            await eventually(all_is_well, "the audit finds nothing", SETTLE_S)
        except AssertionError:
            raise AssertionError("\n".join(complaints)) from None
        unexplained = self._unexplained()
        assert not unexplained, f"sweepers found {unexplained}, which {sorted(self._struck)} does not explain"

    # --- runs and their effects -----------------------------------------------------------------------------------

    async def _of_runs(self, submitted: Mapping[str, int]) -> list[str]:
        runs = await self._runs()
        there = Counter(run["workflow"] for run in runs)
        unfinished = [run for run in runs if run["status"] != "COMPLETED"]
        return [
            *(
                f"{there[name]} runs of {name}, not {count}"
                for name, count in submitted.items()
                if there[name] != count
            ),
            *(f"{run['workflow']} {run['_id']} is {run['status']}" for run in unfinished),
            *self._of_effects(runs),
        ]

    def _of_effects(self, runs: list[dict[str, Any]]) -> Iterator[str]:
        """Each task that has ended was done once, and once more at most for each time that its worker was lost."""
        written = Counter(entry["what"] for entry in self._environment.journal.all())
        tasks = [(run["workflow"], task) for run in runs for task in run["tasks"]]
        self._losses = sum(_losses(task) for _, task in tasks)
        least: Counter[str] = Counter()
        most: Counter[str] = Counter()
        for workflow, task in tasks:
            what = EFFECTS.get((workflow, task["name"]))
            if what is not None:
                least[what] += 1
                most[what] += 1 + (task.get("retry_count", 0) if what in AGAIN_WITH_EACH_RETRY else _losses(task))
        for what, count in least.items():
            if not count <= written[what] <= most[what]:
                yield f"the ledger has {written[what]} of {what!r}, not {count} to {most[what]}"

    async def _runs(self) -> list[dict[str, Any]]:
        database = connect(self._environment.stack.variables["SUBLET_MONGO_URL"], ServiceSettings().mongo_database)
        namespace = self._environment.namespace
        try:
            runs = await database.find("runs", {"workflow": {"$regex": f"^{namespace}"}})
        finally:
            database.close()
        return [run | {"workflow": run["workflow"].removeprefix(namespace)} for run in runs]

    # --- what is left ---------------------------------------------------------------------------------------------

    async def _of_leftovers(self) -> list[str]:
        stack = self._environment.stack
        complaints = await find_leaks(stack)
        if taken := stack.metric("scheduler", "sublet_slots", state="taken"):
            complaints.append(f"{taken:g} slots are taken")
        if (dead := await self._dead_letters()) != self._dead_before:
            complaints.append(f"{dead - self._dead_before} dead letters")
        complaints += [f"{queue} holds {count} messages" for queue, count in self._pool_queues() if count]
        return complaints

    def _pool_queues(self) -> Iterator[tuple[str, int]]:
        """How many tickets are in the queues of this lab's pools, or with its workers."""
        broker = self._environment.stack.broker
        for line in broker.ctl("list_queues", "-p", broker.node.vhost, "name", "messages").splitlines():
            name, _, count = line.partition("\t")
            if name.startswith("sublet.pool.") and self._environment.namespace in name:
                yield name, int(count)

    async def _dead_letters(self) -> int:
        async with await self._environment.amqp() as connection:
            channel = await connection.channel()
            queue = await channel.declare_queue(DEAD, passive=True)
            return queue.declaration_result.message_count or 0

    # --- sweepers -------------------------------------------------------------------------------------------------

    def _anomalies(self) -> Counter[str]:
        found: Counter[str] = Counter()
        for service in SERVICES:
            for process in self._environment.stack.of(service):
                found += process.metric_by("sweeper", FINDINGS)
        return found

    def _all_found(self) -> Counter[str]:
        return self._found + self._anomalies() - self._found_before

    def _unexplained(self) -> dict[str, int]:
        found = self._all_found()
        return {what: count for what, count in found.items() if not self._struck & EXPLAINED_BY.get(what, frozenset())}


def _losses(task: Mapping[str, Any]) -> int:
    """How often it was begun again although it had not failed."""
    return int(task.get("retry_count", 0)) - int(task.get("retries_used", 0))
