"""From a workflow and its input to a run: what `Workflow` and `Standalone` have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar, cast

import msgspec
from pydantic import TypeAdapter

from sublet._client.config import ClientConfig
from sublet._client.connection import Connection
from sublet._client.refs import Outputs, outputs_of
from sublet._declare.serialization import Codec, check_name, check_size, encode_object
from sublet._declare.task import Task
from sublet._declare.types import (
    JSON,
    DefaultFilter,
    EmptyModel,
    In,
    Priority,
    TriggerWorkflowOptions,
    WorkflowRunTriggerConfig,
)
from sublet._worker.context import ChildSpawn, current_context
from sublet_protocol import ids, limits, specs
from sublet_protocol.messages import ParentLink, RunRequest, RunResult

T = TypeVar("T")

NO_INPUT: Any = EmptyModel()
"""Stands for "no input given": fits every input type without required fields."""


@dataclass(frozen=True, slots=True)
class WorkflowConfig:
    """What is declared about a workflow as a whole."""

    name: str
    description: str | None = None
    input_validator: Any = EmptyModel
    on_events: Sequence[str] = ()
    version: str | None = None
    default_priority: int | Priority = Priority.LOW
    default_filters: Sequence[DefaultFilter] = ()
    default_additional_metadata: JSON = field(default_factory=dict)


class BaseWorkflow(Generic[In]):
    """Something that can be registered with a worker, and run.

    Attributes:
        name: with its namespace.
        tasks: its tasks, in the order of their declaration.
    """

    def __init__(self, declared: WorkflowConfig, connection: Connection, config: ClientConfig) -> None:
        self.name = check_name(config.apply_namespace(declared.name), "the name of a workflow")
        self.description = declared.description
        self.tasks: list[Task[Any, Any]] = []
        self._declared = declared
        self._priority = Priority(declared.default_priority)
        self._connection = connection
        self._config = config
        self._input_codec: Codec[In] = Codec(declared.input_validator)
        for key in declared.on_events:
            check_name(config.apply_namespace(key), "an event key in on_events")
        encode_object(declared.default_additional_metadata, "default_additional_metadata", limits.METADATA_MAX_BYTES)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name!r}>"

    @property
    def input_validator(self) -> TypeAdapter[In]:
        return self._input_codec.adapter

    @property
    def input_validator_type(self) -> Any:
        return self._input_codec.type

    def spec(self) -> specs.WorkflowSpec:
        """The declaration as it travels, with its version: a digest of all the rest.

        Raises:
            ValueError: there are no tasks, names are given twice, or parents are unknown or form a cycle.
        """
        if not self.tasks:
            raise ValueError(f"workflow {self.name!r} has no tasks: declare some with @workflow.task()")
        spec = specs.WorkflowSpec(
            name=self.name,
            tasks=specs.topological(tuple(task.spec() for task in self.tasks)),
            on_events=tuple(self._config.apply_namespace(key) for key in self._declared.on_events),
            default_filters=tuple(
                specs.EventFilter(expression=f.expression, scope=f.scope, payload=f.payload)
                for f in self._declared.default_filters
            ),
            default_priority=int(self._priority),
            label=self._declared.version,
        )
        return msgspec.structs.replace(spec, version=specs.digest(spec))

    def create_bulk_run_item(
        self,
        input: In = NO_INPUT,
        key: str | None = None,
        options: TriggerWorkflowOptions | None = None,
        child_key: str | None = None,
        additional_metadata: JSON | None = None,
        priority: int | Priority | None = None,
    ) -> WorkflowRunTriggerConfig:
        """One run for ``run_many``. ``key`` is for your own use; the others are as in ``run``.

        Raises:
            pydantic.ValidationError: the input does not fit the declared type.
            ValueError: the input or the metadata cannot be written as JSON, or is too large.
        """
        raw = self._input_codec.encode(self._input_codec.check(NO_INPUT if input is None else input))
        check_size(raw, f"The input of workflow {self.name!r}", limits.PAYLOAD_MAX_BYTES)
        options = options or TriggerWorkflowOptions()
        metadata = {
            **self._declared.default_additional_metadata,
            **options.additional_metadata,
            **(additional_metadata or {}),
        }
        priority = options.priority if priority is None else priority
        return WorkflowRunTriggerConfig(
            workflow_name=self.name,
            input=raw.decode(),
            key=key,
            options=TriggerWorkflowOptions(
                child_key=options.child_key if child_key is None else child_key,
                additional_metadata=metadata,
                priority=None if priority is None else Priority(priority),
            ),
        )

    # --- for the typed methods of the subclasses ------------------------------------------------------------------

    def _value(self, outputs: Outputs) -> Any:
        """What the outputs of a completed run are for the caller."""
        raise NotImplementedError

    def _child_value(self, raw: bytes | None) -> Any:
        """The same from the output of a child as its durable parent sees it."""
        raise NotImplementedError

    def _ref(self, run_id: str) -> Any:
        raise NotImplementedError

    def _run_items(self, items: Sequence[WorkflowRunTriggerConfig], wait: bool) -> list[Any]:
        """Blocks. Values or exceptions in the order of the items; refs without ``wait``."""
        if not items:
            return []
        requests = self._requests(items)
        if not wait:
            self._connection.sync(self._connection.request(requests))
            return [self._ref(request.run_id) for request in requests]
        return self._outcomes(self._connection.sync(self._connection.run(requests)))

    async def _aio_run_items(self, items: Sequence[WorkflowRunTriggerConfig], wait: bool) -> list[Any]:
        """As `_run_items`; in a durable task through its log."""
        if not items:
            return []
        context = current_context.get()
        if context is not None and context.is_durable:
            spawned = await cast("Any", context)._aio_spawn(self._spawns(items), wait)
            return list(spawned) if wait else [self._ref(run_id) for run_id in spawned]
        requests = self._requests(items)
        if not wait:
            await self._connection.aio(self._connection.request(requests))
            return [self._ref(request.run_id) for request in requests]
        return self._outcomes(await self._connection.aio(self._connection.run(requests)))

    def _outcomes(self, results: Sequence[RunResult]) -> list[Any]:
        outcomes: list[Any] = []
        for result in results:
            try:
                outcomes.append(self._value(outputs_of(result)))
            except Exception as error:  # what the output's own type raises is an outcome too
                outcomes.append(error)
        return outcomes

    def _requests(self, items: Sequence[WorkflowRunTriggerConfig]) -> list[RunRequest]:
        """Run requests; inside a task they are its children, and the same again when the task is retried."""
        context = current_context.get()
        requested_at = self._connection.now()
        requests = []
        for item in items:
            if context is None:
                run_id, parent, index = self._connection.new_id(), None, None
            else:
                index = context._next_child_index()
                child_key = item.options.child_key
                run_id = ids.child_run_id(context.task_run_id, child_key=child_key, index=index)
                parent = ParentLink(task_run_id=context.task_run_id)
            requests.append(
                RunRequest(
                    run_id=run_id,
                    workflow=item.workflow_name,
                    input=msgspec.Raw((item.input or "{}").encode()),
                    metadata=_merged_metadata(item),
                    priority=item.options.priority,
                    parent=parent,
                    notify_parent=False,
                    child_index=index,
                    child_key=item.options.child_key,
                    requested_at=requested_at,
                )
            )
        return requests

    def _spawns(self, items: Sequence[WorkflowRunTriggerConfig]) -> list[ChildSpawn]:
        return [
            ChildSpawn(
                workflow=item.workflow_name,
                input_json=(item.input or "{}").encode(),
                metadata=_merged_metadata(item),
                priority=item.options.priority,
                child_key=item.options.child_key,
                decode=self._child_value,
            )
            for item in items
        ]


def _merged_metadata(item: WorkflowRunTriggerConfig) -> dict[str, object]:
    """The item's metadata over that of the running task, if there is one."""
    context = current_context.get()
    inherited: Mapping[str, object] = {} if context is None else context.additional_metadata
    merged = {**inherited, **item.options.additional_metadata}
    if merged:
        encode_object(merged, "additional_metadata", limits.METADATA_MAX_BYTES)
    return merged


def only(outcomes: Sequence[Any]) -> Any:
    """The outcome of the only item: returned, or raised."""
    (outcome,) = outcomes
    if isinstance(outcome, BaseException):
        raise outcome
    return outcome


def unless_failed(outcomes: list[T], return_exceptions: bool) -> list[T]:
    """The outcomes; raises the first exception among them unless they are wanted as values."""
    if not return_exceptions:
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise outcome
    return outcomes
