"""What task bodies and the client observed, recorded outside of the simulated system."""

from __future__ import annotations

import itertools
import json
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from simulation.system.processes import Process

ReportViolation = Callable[[str], None]


@dataclass(eq=False)
class Body:
    """One execution of a task's function."""

    token: str
    task_run_id: str
    lease: str
    process: Process
    durable: bool
    started_s: float
    waits: int = 0
    """Branches that are inside a durable operation."""
    branches: int = 1
    released: bool = False
    ended: bool = False

    @property
    def takes_slot(self) -> bool:
        waits = self.durable and self.waits >= self.branches
        return not (self.released or self.ended or self.process.gone or waits)


@dataclass
class Slept:
    started_s: float
    duration_s: float
    ended_s: float | None = None


@dataclass
class History:
    """``now`` gives the true time, in virtual seconds."""

    now: Callable[[], float]
    report_violation: ReportViolation
    on_begin: Callable[[Process, bool], None]
    """Called when a body begins: its process, and whether it is durable."""
    bodies: list[Body] = field(default_factory=list)
    outputs: dict[str, tuple[str, str]] = field(default_factory=dict)
    """By the token of the body: the task run and the output that it returned."""
    answers: dict[tuple[str, str], tuple[str, str]] = field(default_factory=dict)
    """By task run and step number in the program: the step and its answer."""
    sleeps: dict[tuple[str, str], Slept] = field(default_factory=dict)
    results: dict[str, tuple[str, Any]] = field(default_factory=dict)
    """By run: status and outputs that the client received."""
    memos_sent: set[int] = field(default_factory=set)
    """Values of memos that have reached the broker."""
    _running: dict[tuple[Process, bool], list[Body]] = field(default_factory=lambda: defaultdict(list))
    _tokens: itertools.count[int] = field(default_factory=itertools.count)

    def begin(self, task_run_id: str, lease: str, process: Process, durable: bool) -> Body:
        token = f"{lease}/{next(self._tokens)}"
        body = Body(token, task_run_id, lease, process, durable, self.now())
        self.bodies.append(body)
        self._running[process, durable].append(body)
        self.on_begin(process, durable)
        return body

    def busy(self, process: Process, durable: bool) -> int:
        """The number of slots that running bodies take."""
        running = self._running[process, durable] = [b for b in self._running[process, durable] if not b.ended]
        return sum(body.takes_slot for body in running)

    def mint(self) -> int:
        """A unique number, for a memo to record."""
        return next(self._tokens)

    def remembered(self, body: Body, step_number: str, value: int) -> None:
        """The code received the value of a memo: the broker must have it, so that a replay gives the same."""
        if value not in self.memos_sent and not body.process.gone:
            self.report_violation(
                f"{body.lease} at {step_number} continues with memo {value}, which the broker does not have"
            )

    def answered(self, body: Body, step_number: str, step: Any, answer: Any) -> None:
        """A step that is answered again must be the same and get the same answer."""
        if body.process.gone:
            return
        new = (json.dumps(step, sort_keys=True), json.dumps(answer, sort_keys=True))
        old = self.answers.setdefault((body.task_run_id, step_number), new)
        if old != new:
            self.report_violation(
                f"{body.task_run_id} at {step_number}: {old[0]} gave {old[1]}, and in {body.lease} {new[0]} {new[1]}"
            )

    def returned(self, body: Body, output: Any) -> None:
        self.outputs[body.token] = (body.task_run_id, json.dumps(output, sort_keys=True))

    def ended(self, run_id: str, status: str, value: Any) -> None:
        if run_id in self.results and self.results[run_id] != (status, value):
            self.report_violation(f"run {run_id} ended twice: {self.results[run_id]}, then {(status, value)}")
        self.results[run_id] = (status, value)
