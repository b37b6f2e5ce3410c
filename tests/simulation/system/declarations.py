"""The workflows that the workers of a simulation register, as a user's module would declare them."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from simulation.checkers.history import History
from simulation.scenarios.plan import DagPlan, Plan, TaskPlan
from simulation.system.programs import Bodies
from sublet import DefaultFilter, EvictionPolicy, ParentCondition, SleepCondition, Sublet, UserEventCondition, or_

EXECUTION_TIMEOUT = timedelta(seconds=12)


def declare(client: Sublet, plan: Plan, history: History, version: int) -> dict[str, Any]:
    """All workflows by name. Each version has a slightly longer execution timeout, and so is another definition."""
    sublet: Any = client  # generated workflows have no useful types
    workflows: dict[str, Any] = {}
    bodies = Bodies(history, workflows)
    execution_timeout = EXECUTION_TIMEOUT + timedelta(milliseconds=version)
    options: dict[str, Any] = {"input_validator": dict, "execution_timeout": execution_timeout}
    workflows["plain"] = sublet.task(name="plain", retries=1, **options)(bodies.ordinary)
    workflows["brittle"] = sublet.task(name="brittle", retries=3, backoff_factor=1.5, backoff_max_seconds=3, **options)(
        bodies.ordinary
    )
    workflows["steady"] = sublet.durable_task(name="steady", retries=2, backoff_factor=1.2, **options)(bodies.durable)
    workflows["resident"] = sublet.durable_task(
        name="resident", retries=1, eviction_policy=EvictionPolicy(ttl=timedelta(seconds=3)), **options
    )(bodies.durable)
    workflows["sticky"] = sublet.durable_task(
        name="sticky", eviction_policy=EvictionPolicy(ttl=None, allow_capacity_eviction=True), **options
    )(bodies.durable)
    workflows["eager"] = sublet.task(name="eager", on_events=["order.*"], **options)(
        bodies.fixed([["work", 0.1]], durable=False)
    )
    workflows["choosy"] = sublet.durable_task(
        name="choosy",
        on_events=["order.placed"],
        default_filters=[DefaultFilter(expression="input.n >= 1", scope="shop")],
        **options,
    )(bodies.fixed([["sleep", 1.0]], durable=True))
    for dag in plan.dags:
        workflows[dag.name] = _dag(sublet, dag, bodies, execution_timeout)
    return workflows


def _dag(sublet: Sublet, plan: DagPlan, bodies: Bodies, execution_timeout: timedelta) -> Any:
    workflow = sublet.workflow(name=plan.name, input_validator=dict)
    tasks: dict[str, Any] = {}
    for task in plan.tasks:
        declare_task = workflow.durable_task if task.durable else workflow.task
        tasks[task.name] = declare_task(
            name=task.name,
            parents=[tasks[name] for name in task.parents],
            retries=task.retries,
            execution_timeout=execution_timeout,
            **_conditions(task, tasks),
        )(bodies.fixed(task.steps, task.durable))
    if plan.on_failure:
        workflow.on_failure_task()(bodies.fixed([["work", 0.1]], durable=False))
    if plan.on_success:
        workflow.on_success_task()(bodies.fixed([["work", 0.1]], durable=False))
    return workflow


def _conditions(task: TaskPlan, tasks: dict[str, Any]) -> dict[str, Any]:
    """The three lists; keys are unique over all of them."""
    lists: dict[str, Any] = {}
    for name in ("wait_for", "skip_if", "cancel_if"):
        entries = []
        for g, group in enumerate(getattr(task, name)):
            conditions = [_condition(spec, f"{name}.{g}.{c}", tasks) for c, spec in enumerate(group)]
            entries.append(or_(*conditions) if len(conditions) > 1 else conditions[0])
        lists[name] = entries
    return lists


def _condition(spec: list[Any], key: str, tasks: dict[str, Any]) -> Any:
    match spec[0]:
        case "sleep":
            return SleepCondition(timedelta(seconds=spec[1]), readable_data_key=key)
        case "event":
            return UserEventCondition(spec[1], spec[2], readable_data_key=key, scope=spec[3])
        case _:
            return ParentCondition(tasks[spec[1]], spec[2], readable_data_key=key)
