"""Shrinks a failing plan to a small one that still fails, and prints what happens in it.

Parts are left out, large ones first, as long as a check still fails. The same plan always shrinks to the same plan,
because everything random in a simulation comes from its seed.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

from simulation.scenarios.plan import DagPlan, EventPlan, Fault, Plan, RunPlan, TaskPlan
from simulation.simulation import Outcome, simulate
from simulation.system.programs import Program

SIMULATIONS_MAX = 400
"""Simulations for one plan: they take a minute or two."""

NOISE = re.compile(r"^\S+ (sends|receives|receives again) to [\w.]*: (((heartbeat|tick|event)\(.*\))?(, |$))*$")
"""Lines about heartbeats, ticks and events only; events are in the plan."""

RUN_ID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")

T = TypeVar("T")
D = TypeVar("D", Plan, RunPlan, DagPlan, TaskPlan, Fault)


def shrink(plan: Plan) -> tuple[Plan, Outcome]:
    """The smallest plan that was found, and its outcome. ``plan`` must fail."""
    outcome, simulations = simulate(plan), 0
    assert outcome.violations, f"seed {plan.seed} does not fail"
    candidates = _smaller(plan)
    while simulations < SIMULATIONS_MAX and (candidate := next(candidates, None)) is not None:
        simulations += 1
        candidate_outcome = simulate(candidate)
        if candidate_outcome.violations:
            plan, outcome, candidates = candidate, candidate_outcome, _smaller(candidate)
    return plan, outcome


def trace(plan: Plan) -> list[str]:
    """What happens in a plan up to its first violation, line by line. If the violation names runs: only about these."""
    outcome = simulate(plan, verbose=True)
    end = next((n for n, line in enumerate(outcome.story) if "VIOLATION" in line), len(outcome.story) - 1)
    named = set(RUN_ID.findall(outcome.violations[0] if outcome.violations else ""))
    lines = [line for line in outcome.story[: end + 1] if not NOISE.match(line[11:])]
    others = {run for line in lines if "  run " in line for run in RUN_ID.findall(line)} - named
    return [line for line in lines if not others.intersection(RUN_ID.findall(line))] if named else lines


def in_words(plan: Plan) -> list[str]:
    """The contents of a plan, line by line."""
    counts = f"{plan.shards} shards, {plan.schedulers} schedulers, {plan.timers} timers, {plan.ingests} event-ingests"
    lines = [f"seed {plan.seed}: {counts}, workers:"]
    lines += [
        f"{worker.slots} slots and {worker.durable_slots} durable slots{', a helper' if worker.helper else ''}"
        for worker in plan.workers
    ]
    lines += ["all limits are tiny"] if plan.has_tiny_limits else []
    lines += [f"the clock of {role} is {skew_s:+.3f} s off" for role, skew_s in plan.skew_s.items()]
    lines += [f"{task}" for dag in plan.dags for task in (f"workflow {dag.name}:", *dag.tasks)]
    lines += [f"{run.at_s:6.2f} s: run {run.workflow} {run.steps}{_changes(run)}" for run in plan.runs]
    lines += [f"{event.at_s:6.2f} s: event {event.key} {event.payload}{_scope(event)}" for event in plan.events]
    return lines + [str(fault) for fault in plan.faults]


def _scope(event: EventPlan) -> str:
    return f" of scope {event.scope}" if event.scope is not None else ""


def _changes(run: RunPlan) -> str:
    changes = [(at_s, "cancelled") for at_s in run.cancels_at_s] + [(at_s, "replayed") for at_s in run.replays_at_s]
    return "".join(f", {what} at {at_s:.2f} s" for at_s, what in sorted(changes))


# --- smaller plans ----------------------------------------------------------------------------------------------


def _smaller(plan: Plan) -> Iterator[Plan]:
    """Plans with something left out, large parts first."""
    for name in ("faults", "runs", "events"):
        for kept in _with_less(getattr(plan, name)):
            yield _changed(plan, **{name: kept})
    used = {run.workflow for run in plan.runs}
    needed = tuple(dag for dag in plan.dags if dag.name in used)
    if needed != plan.dags:
        yield _changed(plan, dags=needed)
    for count in ("schedulers", "timers", "ingests", "shards"):
        if getattr(plan, count) > 1:
            yield _changed(plan, **{count: 1})
    if len(plan.workers) > 1:
        yield _changed(plan, workers=plan.workers[:-1])
    if plan.skew_s:
        yield _changed(plan, skew_s={})
    if plan.has_tiny_limits:
        yield _changed(plan, has_tiny_limits=False)
    for n, fault in enumerate(plan.faults):
        if fault.steps:
            yield _changed(plan, faults=_with(plan.faults, n, _changed(fault, steps=0)))
    for n, run in enumerate(plan.runs):
        for smaller_run in _smaller_run(run):
            yield _changed(plan, runs=_with(plan.runs, n, smaller_run))
    for n, dag in enumerate(plan.dags):
        for smaller_dag in _smaller_dag(dag):
            yield _changed(plan, dags=_with(plan.dags, n, smaller_dag))


def _changed(plan: D, **changes: Any) -> D:
    return dataclasses.replace(plan, **changes)


def _with_less(items: Sequence[T]) -> Iterator[tuple[T, ...]]:
    """Without all items, without each half, quarter, …, each single item."""
    size = len(items)
    while size:
        for start in range(0, len(items), size):
            yield (*items[:start], *items[start + size :])
        size //= 2


def _with(items: Sequence[T], index: int, item: T) -> tuple[T, ...]:
    return (*items[:index], item, *items[index + 1 :])


def _smaller_run(run: RunPlan) -> Iterator[RunPlan]:
    for name in ("cancels_at_s", "replays_at_s"):
        for kept in _with_less(getattr(run, name)):
            yield _changed(run, **{name: kept})
    for steps in _smaller_program(run.steps):
        yield _changed(run, steps=steps)


def _smaller_program(steps: Program) -> Iterator[Program]:
    """Without a step, or with a smaller program inside of a step."""
    for kept in _with_less(steps):
        yield list(kept)
    for n, step in enumerate(steps):
        for smaller_step in _smaller_step(step):
            yield list(_with(steps, n, smaller_step))


def _smaller_step(step: list[Any]) -> Iterator[list[Any]]:
    match step:
        case ["child" | "shared" | "start" as verb, workflow, program]:
            yield from ([verb, workflow, smaller] for smaller in _smaller_program(program))
        case ["children", workflow, programs]:
            yield from (["children", workflow, smaller] for smaller in _smaller_branches(programs))
        case ["gather" | "group" | "race" as verb, programs]:
            yield from ([verb, smaller] for smaller in _smaller_branches(programs))
        case ["wait", groups] if len(groups) > 1:
            yield from (["wait", [group]] for group in groups)


def _smaller_branches(programs: list[Program]) -> Iterator[list[Program]]:
    for kept in _with_less(programs):
        if kept:
            yield list(kept)
    for n, program in enumerate(programs):
        for smaller in _smaller_program(program):
            yield list(_with(programs, n, smaller))


def _smaller_dag(dag: DagPlan) -> Iterator[DagPlan]:
    if len(dag.tasks) > 1:
        yield _changed(dag, tasks=dag.tasks[:-1])
    if dag.on_failure or dag.on_success:
        yield _changed(dag, on_failure=False, on_success=False)
    for n, task in enumerate(dag.tasks):
        for smaller_task in _smaller_task(task):
            yield _changed(dag, tasks=_with(dag.tasks, n, smaller_task))


def _smaller_task(task: TaskPlan) -> Iterator[TaskPlan]:
    for name in ("wait_for", "skip_if", "cancel_if"):
        for kept in _with_less(getattr(task, name)):
            yield _changed(task, **{name: list(kept)})
    for steps in _smaller_program(task.steps):
        yield _changed(task, steps=steps)
