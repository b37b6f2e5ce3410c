"""Generated workloads: from a seed to a plan. Faults are drawn in `faults.driver`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from random import Random
from typing import Any

from simulation.faults.driver import draw_faults
from simulation.scenarios.plan import DagPlan, EventPlan, Plan, RunPlan, TaskPlan, WorkerPlan
from simulation.system.programs import Program

EVENT_KEYS = ("paid", "shipped", "news")
TRIGGER_KEYS = ("order.placed", "order.sent")
"""Events of these start runs; see `declarations`."""
SCOPES = (None, "shop", "desk")
VALUES = 3
"""The number of values of ``n`` in events, from 0; expressions select some of them."""

ORDINARY = ("plain", "brittle")
DURABLE = ("steady", "resident", "sticky")
HELPED = ("plain", "steady")
"""The workflows of helper workers."""

LAST_WORK_S = 25.0
"""Runs are requested and events are published until this time."""


def draw_plan(seed: int, kinds: Sequence[str] = ()) -> Plan:
    """``kinds``: only faults of these kinds; all if empty."""
    random = Random(seed)
    dags = tuple(_dag(random, f"dag{number}") for number in range(random.choice((0, 1, 1, 2))))
    plan = Plan(
        seed=seed,
        shards=random.choice((1, 2, 2, 3)),
        schedulers=random.choice((1, 2, 2, 3)),
        timers=random.choice((1, 2)),
        ingests=random.choice((1, 2)),
        workers=tuple(_worker(random, helper=number > 0) for number in range(random.choice((1, 2, 3)))),
        latency_s=random.choice((0.001, 0.004, 0.02)),
        store_latency_s=random.choice((0.001, 0.004, 0.03)),
        skew_s={},
        dags=dags,
        runs=tuple(_run(random, dags) for _ in range(random.randint(2, random.choice((6, 10, 10, 25))))),
        events=tuple(_event(random) for _ in range(random.randint(0, 12))),
        lingers_s=random.choice((0.0, 0.0, 0.0, 0.0, 45.0)),
    )
    return dataclasses.replace(draw_faults(random, plan, kinds), has_tiny_limits=random.random() < 0.2)


def _worker(random: Random, helper: bool) -> WorkerPlan:
    slots, durable_slots = random.choice((1, 2, 4)), random.choice((1, 2, 4))
    return WorkerPlan(slots, durable_slots, helper=helper and random.random() < 0.15)


def _run(random: Random, dags: tuple[DagPlan, ...]) -> RunPlan:
    names = [*(dag.name for dag in dags), *ORDINARY, *DURABLE, *DURABLE]
    workflow = random.choice(names)
    steps: Program = []
    if workflow in ORDINARY:
        steps = _ordinary_program(random)
    elif workflow in DURABLE:
        steps = _durable_program(random, depth=2)
    at_s = random.random() * LAST_WORK_S if random.random() < 0.6 else 0.0
    if random.random() < 0.05:
        return RunPlan(at_s, workflow, steps, replays_at_s=(at_s + random.random() * 40,))
    changes: list[float] = []  # cancelled, replayed, cancelled, …
    change_at_s = at_s + random.random() * 15
    while random.random() < (0.5 if changes else 0.1):
        changes.append(change_at_s)
        change_at_s += random.random() * random.choice((0.3, 3.0, 12.0))
    return RunPlan(at_s, workflow, steps, cancels_at_s=tuple(changes[::2]), replays_at_s=tuple(changes[1::2]))


def _event(random: Random) -> EventPlan:
    key = random.choice(EVENT_KEYS if random.random() < 0.7 else TRIGGER_KEYS)
    return EventPlan(random.random() * LAST_WORK_S, key, {"n": random.randrange(VALUES)}, random.choice(SCOPES))


# --- programs ---------------------------------------------------------------------------------------------------


def _ordinary_program(random: Random) -> Program:
    steps: Program = []
    for _ in range(random.randint(0, 3)):
        kind = random.random()
        if kind < 0.55:
            steps.append(["work", _seconds(random)])
        elif kind < 0.7:
            steps.append(["release"])
        elif kind < 0.8:
            steps.append(["start", random.choice(ORDINARY), [["work", _seconds(random)]]])
        elif kind < 0.9:
            steps.append(["fail", random.choice((1, 1, 2, 9))])
        elif kind < 0.95:
            steps.append(["refresh", 5.0])
        else:
            steps.append(random.choice((["work", 30.0], ["cancel"])))
    return steps


def _durable_program(random: Random, depth: int) -> Program:
    return [_durable_step(random, depth) for _ in range(random.randint(1, 4))]


def _durable_step(random: Random, depth: int) -> list[Any]:
    kinds = {
        "sleep": 20,
        "event": 15,
        "wait": 15,
        "memo": 8,
        "now": 4,
        "work": 8,
        "fail": 4,
        "release": 2,
        "child": 8 if depth else 0,
        "shared": 3 if depth else 0,
        "children": 6 if depth else 0,
        "start": 4,
        "gather": 8 if depth else 0,
        "group": 4 if depth else 0,
        "race": 5 if depth else 0,
        "whim": 1,
        "cancel": 1,
    }
    (kind,) = random.choices(list(kinds), weights=list(kinds.values()))
    match kind:
        case "sleep":
            return ["sleep", random.choice((0.0, 0.2, 1.0, _seconds(random), 8.0))]
        case "event":
            return ["event", *_event_wanted(random)]
        case "wait":
            return ["wait", _groups(random)]
        case "work":
            return ["work", _seconds(random)]
        case "fail":
            return ["fail", random.choice((1, 1, 2, 9))]
        case "child":
            return ["child", *_child(random, depth)]
        case "shared":
            return ["shared", random.choice(ORDINARY), [["work", 1.0]]]
        case "children":
            workflow = random.choice(ORDINARY)
            return ["children", workflow, [_ordinary_program(random) for _ in range(random.randint(1, 4))]]
        case "start":
            return ["start", random.choice(ORDINARY), [["work", _seconds(random)]]]
        case "gather" | "group":
            return [kind, [_durable_program(random, depth - 1) for _ in range(random.randint(2, 3))]]
        case "race":
            return ["race", [_timeless_program(random) for _ in range(random.randint(2, 3))]]
        case _:
            return [kind]


def _timeless_program(random: Random) -> Program:
    """Only waits: the winner of a race must not depend on durations that the durable log does not record."""
    steps: Program = []
    for _ in range(random.randint(1, 3)):
        kind = random.choice(("sleep", "event", "wait", "child"))
        match kind:
            case "sleep":
                steps.append(["sleep", random.choice((0.0, 0.2, 1.0, 5.0))])
            case "event":
                steps.append(["event", *_event_wanted(random)])
            case "wait":
                steps.append(["wait", _groups(random)])
            case _:
                steps.append(["child", random.choice(ORDINARY), _ordinary_program(random)])
    return steps


def _child(random: Random, depth: int) -> tuple[str, Program]:
    if random.random() < 0.5:
        return random.choice(ORDINARY), _ordinary_program(random)
    return random.choice(DURABLE), _durable_program(random, depth - 1)


def _groups(random: Random) -> list[list[list[Any]]]:
    return [[_condition(random) for _ in range(random.choice((1, 2, 2, 3)))] for _ in range(random.choice((1, 1, 2)))]


def _condition(random: Random) -> list[Any]:
    if random.random() < 0.5:
        return ["sleep", random.choice((0.0, 0.5, 2.0, 6.0, 12.0))]
    return ["event", *_event_wanted(random)]


def _event_wanted(random: Random) -> tuple[str, str | None, str | None]:
    """Key, expression and scope. Events that are published at the end, to end all waits, have the scope ``shop``."""
    n = random.randrange(VALUES)
    expression = random.choice((None, f"input.n == {n}", f"input.n >= {n}"))
    return random.choice(EVENT_KEYS), expression, random.choice((None, None, None, "shop"))


def _seconds(random: Random) -> float:
    return round(random.random() * random.choice((0.1, 0.1, 1.0, 1.0, 3.0, 9.0)), 3)


# --- DAGs -------------------------------------------------------------------------------------------------------


def _dag(random: Random, name: str) -> DagPlan:
    tasks: list[TaskPlan] = []
    for number in range(random.randint(2, 6)):
        parents = tuple(task.name for task in tasks if random.random() < 0.4)
        durable = random.random() < 0.3
        tasks.append(
            TaskPlan(
                name=f"t{number}",
                durable=durable,
                parents=parents,
                wait_for=_dag_groups(random, parents) if random.random() < 0.4 else [],
                skip_if=_dag_groups(random, parents) if random.random() < 0.2 else [],
                cancel_if=_dag_groups(random, parents) if random.random() < 0.1 else [],
                steps=_durable_program(random, depth=0) if durable else _ordinary_program(random),
                retries=random.choice((0, 0, 1, 2)),
            )
        )
    return DagPlan(name, tuple(tasks), on_failure=random.random() < 0.3, on_success=random.random() < 0.3)


def _dag_groups(random: Random, parents: tuple[str, ...]) -> list[list[list[Any]]]:
    return [
        [_dag_condition(random, parents) for _ in range(random.choice((1, 1, 2)))]
        for _ in range(random.choice((1, 1, 2)))
    ]


def _dag_condition(random: Random, parents: tuple[str, ...]) -> list[Any]:
    if parents and random.random() < 0.4:
        return ["parent", random.choice(parents), random.choice((None, "output.n >= 1", "output.n >= 3"))]
    return _condition(random)
