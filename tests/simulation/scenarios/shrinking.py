"""Cuts a plan that fails down to a small one that still fails, and tells what happens in it.

Parts are left out, large ones first, as long as anything is still violated. The same plan always shrinks to the same
one: whatever is random in a simulation comes from its seed.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

from simulation.scenarios.plan import DagPlan, EventPlan, Fault, Plan, RunPlan, TaskPlan
from simulation.simulation import Outcome, simulate
from simulation.system.programs import Program

TRIALS_MAX = 400
"""Simulations that are spent on one plan: a minute or two."""

NOISE = re.compile(r"^\S+ (sends|receives|receives again) to [\w.]*: (((Heartbeat|Tick|event)\(.*\))?(, |$))*$")
"""Messages that say that somebody lives, or that time passes; events are in the plan."""

RUN_ID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")

T = TypeVar("T")
D = TypeVar("D", Plan, RunPlan, DagPlan, TaskPlan, Fault)


def shrink(plan: Plan) -> tuple[Plan, Outcome]:
    """The smallest plan that was found, and how it ends. ``plan`` must fail."""
    outcome, trials = simulate(plan), 0
    assert outcome.violations, f"seed {plan.seed} does not fail"
    candidates = _smaller(plan)
    while trials < TRIALS_MAX and (candidate := next(candidates, None)) is not None:
        trials += 1
        tried = simulate(candidate)
        if tried.violations:
            plan, outcome, candidates = candidate, tried, _smaller(candidate)
    return plan, outcome


def trace(plan: Plan) -> list[str]:
    """What happens in a plan up to its first violation, in words: of the runs that are named there, if any are."""
    outcome = simulate(plan, tell=True)
    end = next((n for n, line in enumerate(outcome.story) if "VIOLATION" in line), len(outcome.story) - 1)
    named = set(RUN_ID.findall(outcome.violations[0] if outcome.violations else ""))
    told = [line for line in outcome.story[: end + 1] if not NOISE.match(line[11:])]
    others = {run for line in told if "  run " in line for run in RUN_ID.findall(line)} - named
    return [line for line in told if not others.intersection(RUN_ID.findall(line))] if named else told


def in_words(plan: Plan) -> list[str]:
    """What a plan holds."""
    counts = f"{plan.shards} shards, {plan.schedulers} schedulers, {plan.timers} timers, {plan.ingests} event-ingests"
    lines = [f"seed {plan.seed}: {counts}, workers:"]
    lines += [
        f"{each.slots} slots and {each.durable_slots} durable ones{', a helper' if each.helper else ''}"
        for each in plan.workers
    ]
    lines += ["all limits are narrow"] if plan.narrow else []
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
    """Plans with something left out, from much to little."""
    for name in ("faults", "runs", "events"):
        for kept in _with_less(getattr(plan, name)):
            yield _but(plan, **{name: kept})
    used = {run.workflow for run in plan.runs}
    needed = tuple(dag for dag in plan.dags if dag.name in used)
    if needed != plan.dags:
        yield _but(plan, dags=needed)
    for count in ("schedulers", "timers", "ingests", "shards"):
        if getattr(plan, count) > 1:
            yield _but(plan, **{count: 1})
    if len(plan.workers) > 1:
        yield _but(plan, workers=plan.workers[:-1])
    if plan.skew_s:
        yield _but(plan, skew_s={})
    if plan.narrow:
        yield _but(plan, narrow=False)
    for n, fault in enumerate(plan.faults):
        if fault.steps:
            yield _but(plan, faults=_with(plan.faults, n, _but(fault, steps=0)))
    for n, run in enumerate(plan.runs):
        for smaller_run in _smaller_run(run):
            yield _but(plan, runs=_with(plan.runs, n, smaller_run))
    for n, dag in enumerate(plan.dags):
        for smaller_dag in _smaller_dag(dag):
            yield _but(plan, dags=_with(plan.dags, n, smaller_dag))


def _but(plan: D, **changes: Any) -> D:
    return dataclasses.replace(plan, **changes)


def _with_less(items: Sequence[T]) -> Iterator[tuple[T, ...]]:
    """Without all of them, without each half, quarter, …, each one."""
    size = len(items)
    while size:
        for start in range(0, len(items), size):
            yield (*items[:start], *items[start + size :])
        size //= 2


def _with(items: Sequence[T], place: int, item: T) -> tuple[T, ...]:
    return (*items[:place], item, *items[place + 1 :])


def _smaller_run(run: RunPlan) -> Iterator[RunPlan]:
    for name in ("cancels_at_s", "replays_at_s"):
        for kept in _with_less(getattr(run, name)):
            yield _but(run, **{name: kept})
    for steps in _smaller_program(run.steps):
        yield _but(run, steps=steps)


def _smaller_program(steps: Program) -> Iterator[Program]:
    """Without a step, or with a smaller program in the place of one that a step holds."""
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
        yield _but(dag, tasks=dag.tasks[:-1])
    if dag.on_failure or dag.on_success:
        yield _but(dag, on_failure=False, on_success=False)
    for n, task in enumerate(dag.tasks):
        for smaller_task in _smaller_task(task):
            yield _but(dag, tasks=_with(dag.tasks, n, smaller_task))


def _smaller_task(task: TaskPlan) -> Iterator[TaskPlan]:
    for name in ("wait_for", "skip_if", "cancel_if"):
        for kept in _with_less(getattr(task, name)):
            yield _but(task, **{name: list(kept)})
    for steps in _smaller_program(task.steps):
        yield _but(task, steps=steps)
