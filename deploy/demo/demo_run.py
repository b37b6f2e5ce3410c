"""The state of a demo: its scenarios, the current one with its progress, the lines printed so far, and the results."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from observers import AmqpObserver, Gauges
from worker_processes import WorkerProcesses, WorkerRole

SCENARIO_TIMEOUT_S = 120.0
"""A scenario that takes longer has failed."""

PROGRESS_INTERVAL_S = 2.0
"""Without a live view, the progress is printed as a line at this interval."""


@dataclass(frozen=True)
class Check:
    """A claim of the demo, the figure that was counted, and whether the claim is true."""

    claim: str
    figure: str
    passed: bool


@dataclass
class Scenario:
    title: str
    run: Callable[[DemoRun], Awaitable[list[Check]]]
    checks: list[Check] = field(default_factory=list)
    progress: str = ""
    took_s: float | None = None

    @property
    def passed(self) -> bool:
        return bool(self.checks) and all(check.passed for check in self.checks)


@dataclass
class DemoRun:
    """The environment of the scenarios. ``on_line`` is called with each line and, at an interval, with the progress."""

    scenarios: list[Scenario]
    worker_roles: list[WorkerRole]
    workers: WorkerProcesses
    amqp: AmqpObserver
    gauges: Gauges
    on_line: Callable[[str], None] = lambda line: None
    current: Scenario | None = None
    lines: deque[str] = field(default_factory=lambda: deque(maxlen=8))
    began_at: float = field(default_factory=time.monotonic)
    line_at_s: float = 0.0

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self.began_at

    def say(self, text: str) -> None:
        self.lines.append(self._report(text))

    def progress(self, text: str) -> None:
        """Show the progress of the current scenario."""
        if self.current is not None:
            self.current.progress = text
        if self.elapsed_s - self.line_at_s > PROGRESS_INTERVAL_S:
            self._report(f"  {text}")

    def _report(self, text: str) -> str:
        line = f"{self.elapsed_s:5.1f} s  {text}"
        self.line_at_s = self.elapsed_s
        self.on_line(line)
        return line

    async def run_all(self) -> bool:
        """Run the scenarios one after the other. True if every check passed.

        Raises:
            WorkerFailed: a worker process does not start.
        """
        self.say(f"{len(self.worker_roles)} worker processes are starting")
        await asyncio.gather(*(self.workers.start(role) for role in self.worker_roles))
        for scenario in self.scenarios:
            await self._run_scenario(scenario)
        self.current = None
        return all(scenario.passed for scenario in self.scenarios)

    async def _run_scenario(self, scenario: Scenario) -> None:
        self.current = scenario
        self.say(scenario.title)
        self.gauges.reset()
        began_at = time.monotonic()
        try:
            async with asyncio.timeout(SCENARIO_TIMEOUT_S):
                scenario.checks = await scenario.run(self)
        except TimeoutError:
            scenario.checks = [
                Check(scenario.title, f"not finished after {SCENARIO_TIMEOUT_S:g} s: {scenario.progress}", False)
            ]
        except Exception as error:  # the other scenarios still run; the table shows the error
            scenario.checks = [Check(scenario.title, f"{type(error).__name__}: {error}", False)]
        scenario.took_s = time.monotonic() - began_at
        scenario.progress = f"{scenario.took_s:.0f} s"
        for check in scenario.checks:
            self.say(f"{'✓' if check.passed else '✗'} {check.claim}: {check.figure}")
