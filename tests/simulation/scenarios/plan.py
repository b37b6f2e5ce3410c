"""The plan of a simulation: everything that the seed decides, as data that can be printed, shrunk and run again."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from simulation.system.programs import Program

Role = Literal["scheduler", "timer", "ingest", "worker"]


@dataclass(frozen=True)
class TaskPlan:
    """A task of a DAG. Conditions are or-groups of ``["sleep", s]``, ``["event", key, expression, scope]`` and
    ``["parent", name, expression]``."""

    name: str
    durable: bool
    parents: tuple[str, ...]
    wait_for: list[list[list[Any]]]
    skip_if: list[list[list[Any]]]
    cancel_if: list[list[list[Any]]]
    steps: Program
    retries: int


@dataclass(frozen=True)
class DagPlan:
    name: str
    tasks: tuple[TaskPlan, ...]
    on_failure: bool
    on_success: bool


@dataclass(frozen=True)
class RunPlan:
    """``at_s`` and all other times: virtual seconds after the start of the workload."""

    at_s: float
    workflow: str
    steps: Program
    cancels_at_s: tuple[float, ...] = ()
    replays_at_s: tuple[float, ...] = ()


@dataclass(frozen=True)
class EventPlan:
    at_s: float
    key: str
    payload: dict[str, Any]
    scope: str | None = None


@dataclass(frozen=True)
class Fault:
    """``role``: the process it affects, such as ``scheduler-1``; "" for all. ``steps``: it begins after that many more
    steps of the process, so at any point of its work. The kind decides what the numbers mean; see `driver`."""

    at_s: float
    kind: str
    role: str = ""
    steps: int = 0
    for_s: float = 0.0
    probability: float = 0.0

    @property
    def jump_s(self) -> float:
        """How far a fault of the kind "clock" sets the clock forward."""
        return self.for_s / 5 * (1 if self.probability > 0.3 else -1) if self.kind == "clock" else 0.0

    def __str__(self) -> str:
        parts = [f"{self.at_s:6.2f} s: {self.kind} {self.role or 'for all'}"]
        if self.steps:
            parts.append(f"after {self.steps} steps")
        if self.for_s:
            parts.append(f"for {self.for_s:.2f} s")
        if self.probability:
            parts.append(f"with probability {self.probability:.2f}")
        return ", ".join(parts)


@dataclass(frozen=True)
class WorkerPlan:
    """``helper``: it has only two of the workflows, and so belongs to another pool."""

    slots: int
    durable_slots: int
    helper: bool = False


@dataclass(frozen=True)
class Plan:
    seed: int
    shards: int
    schedulers: int
    timers: int
    ingests: int
    workers: tuple[WorkerPlan, ...]
    latency_s: float
    """Maximum of one hop to or from the broker."""
    store_latency_s: float
    """Maximum of half a round trip to the database."""
    skew_s: dict[str, float]
    """By role: how far its clock is ahead."""
    dags: tuple[DagPlan, ...]
    runs: tuple[RunPlan, ...]
    events: tuple[EventPlan, ...]
    lingers_s: float
    """How long the simulation continues after all runs have ended: a frozen worker may thaw with outdated leases."""
    has_tiny_limits: bool = False
    """Whether all limits are so small that runs reach them; see `tiny_limits`."""
    faults: tuple[Fault, ...] = field(default=())

    @property
    def roles(self) -> list[str]:
        counts = {
            "scheduler": self.schedulers,
            "timer": self.timers,
            "ingest": self.ingests,
            "worker": len(self.workers),
        }
        return [f"{role}-{number}" for role, count in counts.items() for number in range(count)]

    @property
    def greatest_skew_s(self) -> float:
        """The largest difference between two clocks, or between two times of the same clock."""
        skews = [0.0, *self.skew_s.values()]
        return max(skews) - min(skews) + self.jumps_s

    @property
    def jumps_s(self) -> float:
        """The sum of all changes of clocks."""
        return sum(abs(fault.jump_s) for fault in self.faults)
