"""A task of a workflow: the user's function with its options."""

from __future__ import annotations

import contextlib
import copy
import inspect
import typing
from collections.abc import Awaitable, Callable, Iterable
from typing import TYPE_CHECKING, Any, Generic

from sublet._client.config import ClientConfig
from sublet._declare import conditions, mocks
from sublet._declare.conditions import Condition, ParentCondition
from sublet._declare.durations import positive_seconds_of
from sublet._declare.options import Conditions, TaskOptions
from sublet._declare.serialization import Codec, check_name, encode_output
from sublet._declare.types import JSON, EmptyModel, In, R, TaskType
from sublet_protocol import specs

if TYPE_CHECKING:
    from sublet._durable.context import DurableContext
    from sublet._worker.context import Context

    TaskFunction = Callable[[In, Context], R | Awaitable[R]]
    DurableTaskFunction = Callable[[In, DurableContext], Awaitable[R]]


class Task(Generic[In, R]):
    """One task of a workflow, made by ``@workflow.task()`` and the other decorators.

    A task cannot be run by itself: run its workflow, or declare a standalone task (``@client.task()``).

    Attributes:
        name: in lower case; unique in its workflow.
        workflow_name: with its namespace.
        fn: the decorated function.
        execution_timeout, schedule_timeout: as declared, a timedelta or a text.
    """

    def __init__(
        self,
        fn: Callable[..., Any],
        options: TaskOptions,
        *,
        workflow_name: str,
        input_codec: Codec[In],
        config: ClientConfig,
    ) -> None:
        self.fn = fn
        self.workflow_name = workflow_name
        name = (options.name or function_name(fn)).lower() + _SUFFIXES[options.type]
        self.name = check_name(name, "the name of a task")
        self.type = options.type
        self.is_durable = options.is_durable
        self.parents: list[Task[Any, Any]] = list(options.parents or ())
        self.schedule_timeout = options.schedule_timeout
        self.execution_timeout = options.execution_timeout
        self.retries = options.retries
        self.backoff_factor = options.backoff_factor
        self.backoff_max_seconds = options.backoff_max_seconds
        self.wait_for: Conditions = list(options.wait_for or ())
        self.skip_if: Conditions = list(options.skip_if or ())
        self.cancel_if: Conditions = list(options.cancel_if or ())
        self.eviction_policy = options.eviction_policy
        self._config = config
        self._input_codec = input_codec
        self._output_codec: Codec[R] = Codec(return_type(fn, self.name))
        self._check()

    @property
    def is_async_function(self) -> bool:
        return inspect.iscoroutinefunction(self.fn) or inspect.iscoroutinefunction(getattr(self.fn, "__call__", None))  # noqa: B004

    @property
    def output_validator(self) -> typing.Any:
        """The pydantic ``TypeAdapter`` of the return type."""
        return self._output_codec.adapter

    @property
    def output_validator_type(self) -> typing.Any:
        return self._output_codec.type

    def decode_input(self, raw: bytes) -> In:
        """Convert the JSON of the workflow's input to its declared type.

        Raises:
            pydantic.ValidationError: the JSON does not fit the declared type.
        """
        return self._input_codec.decode(raw)

    def encode_output(self, value: R) -> bytes | None:
        """Convert the return value of the function to JSON. None and an empty dictionary become None.

        Raises:
            IllegalTaskOutputError: the value cannot be stored. The text says why and what to do.
        """
        return encode_output(value, self.name)

    def decode_output(self, raw: bytes | None) -> R:
        """Convert the JSON of an output to the return type of the function. None stands for no output.

        Raises:
            pydantic.ValidationError: the JSON does not fit the annotated type.
        """
        return self._output_codec.decode_or_empty(raw)

    def spec(self) -> specs.TaskSpec:
        """The declaration in the form that is sent to the schedulers."""
        return specs.TaskSpec(
            name=self.name,
            durable=self.is_durable,
            parents=tuple(parent.name for parent in self.parents),
            wait_for=conditions.spec_of(self.wait_for, self._config),
            skip_if=conditions.spec_of(self.skip_if, self._config),
            cancel_if=conditions.spec_of(self.cancel_if, self._config),
            retries=self.retries,
            backoff_factor=self.backoff_factor,
            backoff_max_s=self.backoff_max_seconds,
            schedule_timeout_s=positive_seconds_of(self.schedule_timeout, "schedule_timeout"),
            execution_timeout_s=positive_seconds_of(self.execution_timeout, "execution_timeout"),
            on_failure=self.type is TaskType.ON_FAILURE,
        )

    def moved_to(self, workflow_name: str, input_codec: Codec[Any]) -> Task[Any, R]:
        """A copy that belongs to another workflow."""
        moved = copy.copy(self)
        moved.workflow_name = workflow_name
        moved._input_codec = input_codec
        return moved

    # --- unit tests -----------------------------------------------------------------------------------------------

    def mock_run(
        self,
        input: In | None = None,
        additional_metadata: JSON | None = None,
        parent_outputs: dict[str, JSON] | None = None,
        retry_count: int = 0,
        lifespan: Any = None,
        dependencies: dict[str, Any] | None = None,
    ) -> R:
        """Call the function in a unit test, with a context that needs no connection.

        Ids of the context begin with ``mock-``. A durable task cannot wait or start children in it: test such tasks
        with ``sublet.testing``.

        Args:
            input: the input. None: an empty one.
            additional_metadata: value of ``ctx.additional_metadata``.
            parent_outputs: outputs of the parents by task name, for ``ctx.task_output``.
            retry_count: value of ``ctx.retry_count``.
            lifespan: value of ``ctx.lifespan``.
            dependencies: passed to the function as keyword arguments.

        Raises:
            pydantic.ValidationError: the input does not fit the declared type.
            TypeError: the function is async: await `aio_mock_run` instead.
            ValueError: a durable task waits or starts a child.
        """
        result: R = mocks.mock_run(
            self, input, additional_metadata, parent_outputs, retry_count, lifespan, dependencies
        )
        return result

    async def aio_mock_run(
        self,
        input: In | None = None,
        additional_metadata: JSON | None = None,
        parent_outputs: dict[str, JSON] | None = None,
        retry_count: int = 0,
        lifespan: Any = None,
        dependencies: dict[str, Any] | None = None,
    ) -> R:
        """Like `mock_run`, for an async function."""
        result: R = await mocks.aio_mock_run(
            self, input, additional_metadata, parent_outputs, retry_count, lifespan, dependencies
        )
        return result

    def __repr__(self) -> str:
        return f"<Task {self.name!r} of workflow {self.workflow_name!r}>"

    def _check(self) -> None:
        where = f"task {self.name!r}"
        if self.is_durable and not self.is_async_function:
            raise TypeError(f"durable {where} must be an async function: its waits are awaited")
        if not isinstance(self.retries, int) or self.retries < 0:
            raise ValueError(f"retries of {where} must be a whole number from 0, not {self.retries!r}")
        if self.backoff_factor is not None and self.backoff_factor <= 0:
            raise ValueError(f"backoff_factor of {where} must be greater than 0, not {self.backoff_factor!r}")
        if self.backoff_max_seconds is not None and self.backoff_max_seconds <= 0:
            raise ValueError(f"backoff_max_seconds of {where} must be greater than 0, not {self.backoff_max_seconds!r}")
        positive_seconds_of(self.schedule_timeout, f"schedule_timeout of {where}")
        positive_seconds_of(self.execution_timeout, f"execution_timeout of {where}")
        for parent in self.parents:
            if not isinstance(parent, Task):
                raise TypeError(f"parents of {where} must be tasks of the same workflow, not {parent!r}")
        lists = (self.wait_for, self.skip_if, self.cancel_if)
        conditions.check_unique_keys(lists, where)
        self._check_parent_conditions(condition for entries in lists for condition in conditions.flat(entries))

    def _check_parent_conditions(self, all_conditions: Iterable[Condition]) -> None:
        parents = {parent.name for parent in self.parents}
        for condition in all_conditions:
            if isinstance(condition, ParentCondition) and condition.parent.name not in parents:
                raise ValueError(
                    f"task {self.name!r} has a ParentCondition on {condition.parent.name!r}, which is none of its"
                    " parents: add it to parents=[…]"
                )


_SUFFIXES = {TaskType.DEFAULT: "", TaskType.ON_FAILURE: "-on-failure", TaskType.ON_SUCCESS: "-on-success"}


def function_name(fn: Callable[..., Any]) -> str:
    name = getattr(fn, "__name__", None)
    if not isinstance(name, str):
        raise TypeError(f"{fn!r} has no name of its own: give name=…")
    return name


def return_type(fn: Callable[..., Any], task: str) -> Any:
    """The annotated return type. Without an annotation: `EmptyModel`, which accepts any fields."""
    annotations = getattr(fn, "__annotations__", {})
    if "return" not in annotations:
        return EmptyModel
    if not isinstance(annotations["return"], str):
        return annotations["return"] if annotations["return"] is not None else type(None)
    # Only the return type is resolved: the types of the arguments may exist for type checkers only.
    bare = _Annotated(annotations["return"], inspect.unwrap(fn))
    try:
        return typing.get_type_hints(bare, include_extras=True)["return"]
    except NameError as error:
        raise TypeError(
            f"the return type {annotations['return']!r} of task {task!r} cannot be resolved ({error}): "
            "define or import it where the module of the function can see it at run time"
        ) from error


class _Annotated:
    """Looks to `typing.get_type_hints` like a function that has only a return annotation."""

    def __init__(self, returns: str, fn: Callable[..., Any]) -> None:
        self.__annotations__ = {"return": returns}
        self.__globals__ = {**getattr(fn, "__globals__", {}), **_closure(fn)}


def _closure(fn: Callable[..., Any]) -> dict[str, Any]:
    """Variables of the enclosing function that the function uses. Those that are not assigned yet are left out."""
    visible = {}
    for name, cell in zip(fn.__code__.co_freevars, fn.__closure__ or (), strict=True) if inspect.isfunction(fn) else ():
        with contextlib.suppress(ValueError):
            visible[name] = cell.cell_contents
    return visible
