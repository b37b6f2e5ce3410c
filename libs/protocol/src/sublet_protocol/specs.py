"""Definitions that a worker registers: frozen records that are sent in messages and stored in the same form."""

from __future__ import annotations

import hashlib
from functools import cached_property
from typing import Literal

import msgspec

from sublet_protocol import limits


class SleepCondition(msgspec.Struct, frozen=True, tag="sleep", omit_defaults=True):
    """True ``duration_s`` seconds after it was armed."""

    key: str
    duration_s: float


class EventCondition(msgspec.Struct, frozen=True, tag="event", omit_defaults=True):
    """True after the first matching event.

    ``expression`` is CEL over ``input`` (the event's payload). A condition with a ``scope`` needs exactly that
    scope; one without a scope accepts any. ``since_s`` (Unix seconds): events after this time count as well.
    """

    key: str
    event_key: str
    expression: str | None = None
    scope: str | None = None
    since_s: float | None = None


class ParentCondition(msgspec.Struct, frozen=True, tag="parent", omit_defaults=True):
    """Evaluated once, when all parents are done. ``expression`` is CEL over ``output`` (the parent's output)."""

    key: str
    parent: str
    expression: str | None = None


Condition = SleepCondition | EventCondition | ParentCondition
Groups = tuple[tuple[Condition, ...], ...]
"""AND of or-groups: every group needs at least one true condition."""

SlotKind = Literal["task", "durable"]
SLOT_KINDS: tuple[SlotKind, ...] = ("task", "durable")


class TaskSpec(msgspec.Struct, frozen=True, omit_defaults=True, dict=True):
    """One task of a workflow. Times are in seconds."""

    name: str
    durable: bool = False
    parents: tuple[str, ...] = ()
    wait_for: Groups = ()
    skip_if: Groups = ()
    cancel_if: Groups = ()
    retries: int = 0
    backoff_factor: float | None = None
    backoff_max_s: float | None = None
    schedule_timeout_s: float = limits.DEFAULT_SCHEDULE_TIMEOUT_S
    execution_timeout_s: float = limits.DEFAULT_EXECUTION_TIMEOUT_S
    on_failure: bool = False
    """Started once, after the first final failure of another task of the run; skipped if no task failed."""

    @property
    def slot_kind(self) -> SlotKind:
        return "durable" if self.durable else "task"

    @cached_property
    def conditions(self) -> tuple[Condition, ...]:
        """All conditions of the three lists."""
        lists = (self.wait_for, self.skip_if, self.cancel_if)
        return tuple(condition for groups in lists for group in groups for condition in group)

    @cached_property
    def dependencies(self) -> tuple[str, ...]:
        """The tasks that must be done first: the parents, and the tasks that parent conditions name."""
        looked_at = (c.parent for c in self.conditions if isinstance(c, ParentCondition))
        return tuple(dict.fromkeys((*self.parents, *looked_at)))


class WorkflowSpec(msgspec.Struct, frozen=True, omit_defaults=True, dict=True):
    """One workflow version. ``version`` is a digest of the rest, so equal code registers the same version."""

    name: str
    tasks: tuple[TaskSpec, ...]
    version: str = ""
    on_events: tuple[str, ...] = ()
    """Event keys (``*`` is a wildcard for any characters) that start a run."""
    default_filters: tuple[EventFilter, ...] = ()
    default_priority: int = 1
    label: str | None = None
    """The user's own ``version=`` text, for people."""

    def task(self, name: str) -> TaskSpec:
        try:
            return self._by_name[name]
        except KeyError:
            raise KeyError(f"workflow {self.name!r} has no task {name!r}") from None

    @cached_property
    def _by_name(self) -> dict[str, TaskSpec]:
        return {spec.name: spec for spec in self.tasks}

    @cached_property
    def in_order(self) -> tuple[TaskSpec, ...]:
        """The tasks in an order in which each comes after its dependencies. On-failure tasks depend on all others."""
        return tuple(sorted(self.tasks, key=lambda spec: spec.on_failure))


class EventFilter(msgspec.Struct, frozen=True, omit_defaults=True):
    """An event of this scope starts a run if the CEL expression over ``input`` and ``payload`` is true."""

    expression: str
    scope: str
    payload: dict[str, object] = {}


def topological(tasks: tuple[TaskSpec, ...]) -> tuple[TaskSpec, ...]:
    """The tasks with every parent before its children, otherwise in the order given.

    Raises:
        ValueError: a duplicate name, an unknown parent or a cycle; the text names the tasks.
    """
    by_name = {task.name: task for task in tasks}
    if len(by_name) != len(tasks):
        names = [task.name for task in tasks]
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"task names must be unique in a workflow; given twice: {', '.join(twice)}")
    for task in tasks:
        unknown = [parent for parent in task.dependencies if parent not in by_name]
        if unknown:
            raise ValueError(f"task {task.name!r} names unknown parents: {', '.join(unknown)}")
    ordered: dict[str, TaskSpec] = {}
    while len(ordered) < len(tasks):
        free = [t for t in tasks if t.name not in ordered and all(p in ordered for p in t.dependencies)]
        if not free:
            cycle = [t.name for t in tasks if t.name not in ordered]
            raise ValueError(f"the parents of these tasks form a cycle: {', '.join(cycle)}")
        ordered.update((t.name, t) for t in free)
    return tuple(ordered.values())


def digest(spec: WorkflowSpec) -> str:
    """The version of a workflow: 12 hexadecimal digits, a hash of all its fields except the version."""
    body = msgspec.json.encode(msgspec.structs.replace(spec, version=""), order="deterministic")
    return hashlib.sha256(body).hexdigest()[:12]
