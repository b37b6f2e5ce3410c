"""What a simulation is to do: everything that the seed decides, as data that can be printed, cut down and run again."""

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
    """``role``: whom it hits, such as ``scheduler-1``; "" for all. ``steps``: it hits after that many more steps of the
    process, so at any point of its work. The meaning of the numbers depends on the kind; see `faults`."""

    at_s: float
    kind: str
    role: str = ""
    steps: int = 0
    for_s: float = 0.0
    probability: float = 0.0

    @property
    def jump_s(self) -> float:
        """Of a clock that is set: how much later it is then."""
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
    """``helper``: it has but two of the workflows, and so belongs to another pool."""

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
    """Of a hop to or from the broker, at most."""
    store_latency_s: float
    """Of half a round trip to the database, at most."""
    skew_s: dict[str, float]
    """How far the clock of a seat is ahead."""
    dags: tuple[DagPlan, ...]
    runs: tuple[RunPlan, ...]
    events: tuple[EventPlan, ...]
    lingers_s: float
    """How long it goes on when all runs have ended: somebody may still come back who knows nothing of it."""
    narrow: bool = False
    """All limits are so small that they are reached; see `narrowness`."""
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
        """Between any two clocks, or one and itself at another time."""
        skews = [0.0, *self.skew_s.values()]
        return max(skews) - min(skews) + self.jumps_s

    @property
    def jumps_s(self) -> float:
        """By how much clocks are set, all in all."""
        return sum(abs(fault.jump_s) for fault in self.faults)
