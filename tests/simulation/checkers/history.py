"""What the bodies of tasks and the client saw, written down outside of the system."""

from __future__ import annotations

import itertools
import json
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from simulation.system.processes import Process

Complain = Callable[[str], None]


@dataclass(eq=False)
class Body:
    """One execution of a task's function."""

    token: str
    task_run_id: str
    lease: str
    process: Process
    durable: bool
    began_s: float
    waits: int = 0
    """Branches that are inside a durable operation."""
    branches: int = 1
    released: bool = False
    ended: bool = False

    @property
    def takes_a_slot(self) -> bool:
        waits = self.durable and self.waits >= self.branches
        return not (self.released or self.ended or self.process.gone or waits)


@dataclass
class Slept:
    asked_s: float
    duration_s: float
    over_s: float | None = None


@dataclass
class History:
    """``now`` is true time, in virtual seconds."""

    now: Callable[[], float]
    complain: Complain
    on_begin: Callable[[Process, bool], None]
    """Called when a body begins: its process, and whether it is durable."""
    bodies: list[Body] = field(default_factory=list)
    outputs: dict[str, tuple[str, str]] = field(default_factory=dict)
    """By the token of the body: the task run and the output that it returned."""
    answers: dict[tuple[str, str], tuple[str, str]] = field(default_factory=dict)
    """By task run and place in the program: the step, and what it gave."""
    sleeps: dict[tuple[str, str], Slept] = field(default_factory=dict)
    results: dict[str, tuple[str, Any]] = field(default_factory=dict)
    """By run: how it ended as the client was told."""
    memos_sent: set[int] = field(default_factory=set)
    """Values of memos that the broker has."""
    _at_work: dict[tuple[Process, bool], list[Body]] = field(default_factory=lambda: defaultdict(list))
    _tokens: itertools.count[int] = field(default_factory=itertools.count)

    def begin(self, task_run_id: str, lease: str, process: Process, durable: bool) -> Body:
        token = f"{lease}/{next(self._tokens)}"
        body = Body(token, task_run_id, lease, process, durable, self.now())
        self.bodies.append(body)
        self._at_work[process, durable].append(body)
        self.on_begin(process, durable)
        return body

    def busy(self, process: Process, durable: bool) -> int:
        """Slots that are taken there."""
        at_work = self._at_work[process, durable] = [b for b in self._at_work[process, durable] if not b.ended]
        return sum(body.takes_a_slot for body in at_work)

    def mint(self) -> int:
        """A number that nobody else gets: what a memo must remember."""
        return next(self._tokens)

    def remembered(self, body: Body, place: str, value: int) -> None:
        """The code was given the value of a memo: it must be safe."""
        if value not in self.memos_sent and not body.process.gone:
            self.complain(f"{body.lease} at {place} goes on with memo {value}, which the broker does not have")

    def answered(self, body: Body, place: str, step: Any, answer: Any) -> None:
        """The same step at the same place gave the same answer before, if it was answered before."""
        if body.process.gone:
            return
        new = (json.dumps(step, sort_keys=True), json.dumps(answer, sort_keys=True))
        old = self.answers.setdefault((body.task_run_id, place), new)
        if old != new:
            self.complain(
                f"{body.task_run_id} at {place}: {old[0]} gave {old[1]}, and in {body.lease} {new[0]} {new[1]}"
            )

    def returned(self, body: Body, output: Any) -> None:
        self.outputs[body.token] = (body.task_run_id, json.dumps(output, sort_keys=True))

    def ended(self, run_id: str, status: str, value: Any) -> None:
        if run_id in self.results and self.results[run_id] != (status, value):
            self.complain(f"run {run_id} ended twice: {self.results[run_id]}, then {(status, value)}")
        self.results[run_id] = (status, value)
