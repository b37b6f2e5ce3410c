"""When a task of a DAG may run: a pure decision over its parents' states and its conditions.

A task is decided when all its parents are done, or at once when one of them failed or was cancelled. CANCEL goes
before SKIP, and SKIP before RUN. Every combination ends: a task whose conditions can no longer come true is skipped.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from sublet_engine.run.state import Run, TaskRun
from sublet_protocol.cel.expressions import PARENT_VARIABLES, ExpressionError, compile_expression
from sublet_protocol.specs import Condition, Groups, ParentCondition, TaskSpec, WorkflowSpec

Verdict = Literal["run", "skip", "cancel", "wait"]
SKIPPED_OUTPUT = '{"skipped": true}'


def verdict(spec: TaskSpec, workflow: WorkflowSpec, run: Run, task: TaskRun) -> tuple[Verdict, str]:
    """What to do with a PENDING task, and the reason. ``task.met`` must contain the true parent conditions if all
    parents are done."""
    if spec.on_failure:
        return _on_failure_verdict(workflow, run)
    parents = [run.task(name) for name in spec.dependencies]
    for parent in parents:
        if parent.status in ("FAILED", "CANCELLED"):
            return "cancel", f"parent {parent.name!r} was {parent.status.lower()}"
    if not all(parent.terminal for parent in parents):
        return "wait", "parents"
    if spec.cancel_if and all_met(spec.cancel_if, task):
        return "cancel", "its cancel_if came true"
    if parents and all(parent.status == "SKIPPED" for parent in parents):
        return "skip", "all parents were skipped"
    return _conditions_verdict(spec, task)


def _conditions_verdict(spec: TaskSpec, task: TaskRun) -> tuple[Verdict, str]:
    if spec.skip_if and all_met(spec.skip_if, task):
        return "skip", "its skip_if came true"
    if all_met(spec.wait_for, task):
        return "run", ""
    if any(_never(group, task) for group in spec.wait_for):
        return "skip", "a parent condition of its wait_for is false"
    return "wait", "conditions"


def _on_failure_verdict(workflow: WorkflowSpec, run: Run) -> tuple[Verdict, str]:
    others = [run.task(spec.name) for spec in workflow.tasks if not spec.on_failure]
    if any(task.status == "FAILED" for task in others):
        return "run", ""
    if all(task.terminal for task in others):
        return "skip", "no task failed"
    return "wait", "failure"


def all_met(groups: Groups, task: TaskRun) -> bool:
    """AND of or-groups. No groups at all: true (nothing to wait for)."""
    return all(any(condition.key in task.met for condition in group) for group in groups)


def _never(group: tuple[Condition, ...], task: TaskRun) -> bool:
    """The group can never be met: it has only parent conditions, and all are false (the parents are done)."""
    return all(isinstance(c, ParentCondition) for c in group) and not any(c.key in task.met for c in group)


def true_parent_conditions(spec: TaskSpec, run: Run) -> tuple[str, ...]:
    """The keys of the parent conditions that are true, once all parents are done."""
    keys = []
    for condition in spec.conditions:
        if isinstance(condition, ParentCondition) and _parent_condition_true(condition, run):
            keys.append(condition.key)
    return tuple(keys)


def _parent_condition_true(condition: ParentCondition, run: Run) -> bool:
    parent = run.task(condition.parent)
    if parent.status not in ("COMPLETED", "SKIPPED"):
        return False
    if condition.expression is None:
        return True
    try:
        output = msgspec.json.decode(parent.output) if parent.output is not None else {}
        return compile_expression(condition.expression, PARENT_VARIABLES).true(output=output)
    except (ExpressionError, RecursionError):  # an invalid expression, or an output that is nested too deeply
        return False
