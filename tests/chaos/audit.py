"""The audit after a chaos test: compares stored runs, queues, metrics and the task journal with the submitted load."""

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
"""Until the last timers are removed and the last tickets acknowledged. The sweeper checks a subscription without a wait
twice, a minute apart, before it removes it."""

EFFECTS = {
    ("durable_dag", "begin"): "started",
    ("durable_dag", "sleep_and_double"): "slept",
    ("durable_dag", "finish"): "finished",
    ("double", "double"): "doubled",
    ("stumble", "stumble"): "charged",
    ("release", "release"): "release began",
}
"""The journal entry of each task: one for each time that it is done."""

REPEATED_BY_RETRIES = frozenset(("release began",))
"""All others belong to tasks without retries, or are recorded in the durable log."""

EXPLAINED_BY: Mapping[str, frozenset[str]] = {
    "ticket_lost": frozenset(("rabbitmq", "scheduler", "worker")),
    "grant_unseen": frozenset(("rabbitmq", "scheduler", "worker")),
    "result_unseen": frozenset(("rabbitmq", "scheduler", "worker")),
    "timers": frozenset(("timer", "mongodb")),
    "subscriptions": frozenset(("event-ingest", "rabbitmq")),
}
"""For each kind of anomaly the targets whose faults can cause it, because unconfirmed messages are lost with them."""


class Audit:
    """Counts every injected fault, because faults explain anomalies and tasks that ran twice."""

    def __init__(self, environment: Environment) -> None:
        self._environment = environment
        self._faulted: set[str] = set()
        self._found: Counter[str] = Counter()
        self._dead_before = 0
        self._found_before: Counter[str] = Counter()
        self._losses = 0

    def __repr__(self) -> str:
        """The anomalies that sweepers found, and the number of lost workers."""
        return f"sweepers found {dict(self._all_found()) or 'nothing'}, {self._losses} tasks lost their worker"

    async def begin(self) -> None:
        """Remember the dead letters and anomalies of earlier tests on this stack."""
        self._dead_before = await self._dead_letters()
        self._found_before = self._anomalies()

    def fault_follows(self, kind: str, process: Process | None = None) -> None:
        """Call this before each fault: the anomaly counters of a process are lost when it dies."""
        self._faulted.add(kind)
        if process is not None:
            self._found += process.metric_by("sweeper", ANOMALIES)

    async def assert_passed(self, submitted: Mapping[str, int]) -> None:
        """Assert that all submitted runs, counted by workflow, have completed once, and that nothing leaked.

        Raises:
            AssertionError: with all problems.
        """
        problems: list[str] = ["not checked yet"]

        async def no_problems() -> bool:
            problems[:] = [*await self._problems_of_runs(submitted), *await self._leaks()]
            return not problems

        try:
            await eventually(no_problems, "the audit finds no problem", SETTLE_S)
        except AssertionError:
            raise AssertionError("\n".join(problems)) from None
        unexplained = self._unexplained()
        assert not unexplained, f"sweepers found {unexplained}, which faults of {sorted(self._faulted)} do not explain"

    # --- runs and their effects -----------------------------------------------------------------------------------

    async def _problems_of_runs(self, submitted: Mapping[str, int]) -> list[str]:
        runs = await self._runs()
        counts = Counter(run["workflow"] for run in runs)
        unfinished = [run for run in runs if run["status"] != "COMPLETED"]
        return [
            *(
                f"{counts[name]} runs of {name}, not {count}"
                for name, count in submitted.items()
                if counts[name] != count
            ),
            *(f"{run['workflow']} {run['_id']} is {run['status']}" for run in unfinished),
            *self._problems_of_effects(runs),
        ]

    def _problems_of_effects(self, runs: list[dict[str, Any]]) -> Iterator[str]:
        """Each ended task ran once, and at most once more for each lost worker."""
        written = Counter(entry["what"] for entry in self._environment.journal.all())
        tasks = [(run["workflow"], task) for run in runs for task in run["tasks"]]
        self._losses = sum(_losses(task) for _, task in tasks)
        least: Counter[str] = Counter()
        most: Counter[str] = Counter()
        for workflow, task in tasks:
            what = EFFECTS.get((workflow, task["name"]))
            if what is not None:
                least[what] += 1
                most[what] += 1 + (task.get("retry_count", 0) if what in REPEATED_BY_RETRIES else _losses(task))
        for what, count in least.items():
            if not count <= written[what] <= most[what]:
                yield f"the journal has {written[what]} of {what!r}, not {count} to {most[what]}"

    async def _runs(self) -> list[dict[str, Any]]:
        database = connect(self._environment.stack.variables["SUBLET_MONGO_URL"], ServiceSettings().mongo_database)
        namespace = self._environment.namespace
        try:
            runs = await database.find("runs", {"workflow": {"$regex": f"^{namespace}"}})
        finally:
            database.close()
        return [run | {"workflow": run["workflow"].removeprefix(namespace)} for run in runs]

    # --- leaks ----------------------------------------------------------------------------------------------------

    async def _leaks(self) -> list[str]:
        stack = self._environment.stack
        leaks = await find_leaks(stack)
        if taken := stack.metric("scheduler", "sublet_slots", state="taken"):
            leaks.append(f"{taken:g} slots are taken")
        if (dead := await self._dead_letters()) != self._dead_before:
            leaks.append(f"{dead - self._dead_before} dead letters")
        leaks += [f"{queue} holds {count} messages" for queue, count in self._pool_queues() if count]
        return leaks

    def _pool_queues(self) -> Iterator[tuple[str, int]]:
        """The number of tickets in each pool queue of this environment, those with workers included."""
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
                found += process.metric_by("sweeper", ANOMALIES)
        return found

    def _all_found(self) -> Counter[str]:
        return self._found + self._anomalies() - self._found_before

    def _unexplained(self) -> dict[str, int]:
        found = self._all_found()
        return {what: count for what, count in found.items() if not self._faulted & EXPLAINED_BY.get(what, frozenset())}


def _losses(task: Mapping[str, Any]) -> int:
    """How often the task was restarted without a failure of its code."""
    return int(task.get("retry_count", 0)) - int(task.get("retries_used", 0))
