"""The common base of workflows and standalone tasks: makes run requests from inputs, and results from answers."""

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
"""Default for "no input": fits every input type without required fields."""


@dataclass(frozen=True, slots=True)
class WorkflowConfig:
    """Options of a workflow. See `Sublet.workflow` for the meaning of each."""

    name: str
    description: str | None = None
    input_validator: Any = EmptyModel
    on_events: Sequence[str] = ()
    version: str | None = None
    default_priority: int | Priority = Priority.LOW
    default_filters: Sequence[DefaultFilter] = ()
    default_additional_metadata: JSON = field(default_factory=dict)


class BaseWorkflow(Generic[In]):
    """A workflow or a standalone task: can be registered with a worker, and run.

    Attributes:
        name: with its namespace.
        description: as declared.
        tasks: in the order of their declaration. Empty for a stub.
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
        """The declaration in the form that is sent to the schedulers. Its version is a digest of all other fields.

        Raises:
            ValueError: there are no tasks, two tasks have the same name, or parents are unknown or form a cycle.
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
        """Make one item for ``run_many``.

        Args:
            key: for your own use; not sent.

        The other arguments are those of ``run``.

        Raises:
            pydantic.ValidationError: the input does not fit the declared type.
            ValueError: the input or the metadata cannot be written as JSON, or are too large.
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
        """Convert the outputs of a completed run to the value for the caller."""
        raise NotImplementedError

    def _child_value(self, raw: bytes | None) -> Any:
        """Convert the output of a child run to the value for its durable parent. See `ChildSpawn.decode`."""
        raise NotImplementedError

    def _ref(self, run_id: str) -> Any:
        raise NotImplementedError

    def _run_items(self, items: Sequence[WorkflowRunTriggerConfig], wait: bool) -> list[Any]:
        """Run the items, and block. Returns values or exceptions in their order; handles if not ``wait``."""
        if not items:
            return []
        requests = self._requests(items)
        if not wait:
            self._connection.sync(self._connection.request(requests))
            return [self._ref(request.run_id) for request in requests]
        return self._outcomes(self._connection.sync(self._connection.run(requests)))

    async def _aio_run_items(self, items: Sequence[WorkflowRunTriggerConfig], wait: bool) -> list[Any]:
        """Like `_run_items`, for async code. In a durable task the runs are operations of its log."""
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
            except Exception as error:  # also what the type of the output raises
                outcomes.append(error)
        return outcomes

    def _requests(self, items: Sequence[WorkflowRunTriggerConfig]) -> list[RunRequest]:
        """Run requests for the items. Inside a task they are its children, with the same ids in each retry of it."""
        context = current_context.get()
        requested_at = self._connection.now()
        requests = []
        for item in _checked(items):
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
            for item in _checked(items)
        ]


def _checked(items: Sequence[WorkflowRunTriggerConfig]) -> Sequence[WorkflowRunTriggerConfig]:
    for item in items:
        if not isinstance(item, WorkflowRunTriggerConfig):
            raise TypeError(
                f"run_many takes items that workflow.create_bulk_run_item(input) made, not {type(item).__name__}"
            )
    return items


def _merged_metadata(item: WorkflowRunTriggerConfig) -> dict[str, object]:
    """The metadata of the item, merged over those of the running task if there is one."""
    context = current_context.get()
    inherited: Mapping[str, object] = {} if context is None else context.additional_metadata
    merged = {**inherited, **item.options.additional_metadata}
    if merged:
        encode_object(merged, "additional_metadata", limits.METADATA_MAX_BYTES)
    return merged


def only(outcomes: Sequence[Any]) -> Any:
    """Return the value of the only item, or raise its exception."""
    (outcome,) = outcomes
    if isinstance(outcome, BaseException):
        raise outcome
    return outcome


def unless_failed(outcomes: list[T], return_exceptions: bool) -> list[T]:
    """Return the outcomes. Raises the first exception among them, unless ``return_exceptions``."""
    if not return_exceptions:
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise outcome
    return outcomes
