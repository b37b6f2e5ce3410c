"""Inputs and outputs as JSON, and values that are refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import pytest
from pydantic import BaseModel, Field, ValidationError, field_serializer
from typing_extensions import TypedDict  # pydantic wants this one before Python 3.12

from sublet import (
    ClientConfig,
    EmptyModel,
    IllegalTaskOutputError,
    Standalone,
    Sublet,
    Task,
    is_in_sublet_serialization_context,
    remove_null_unicode_character,
)
from sublet_protocol.limits import PAYLOAD_MAX_BYTES


class Point(BaseModel):
    x: int
    at: datetime | None = None


class Renamed(BaseModel):
    order_id: int = Field(alias="orderId")


@dataclass
class Size:
    width: int
    height: int = 0


class Names(TypedDict):
    first: str


def task_returning(annotation: Any) -> Task[Any, Any]:
    def fn(input: Any, ctx: Any) -> Any: ...

    fn.__annotations__["return"] = annotation
    return Sublet(ClientConfig()).task(name="t")(fn).task


def unannotated(input, ctx):  # type: ignore[no-untyped-def]
    ...


# --- outputs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("annotation", "value"),
    [
        (Point, Point(x=1, at=datetime(2026, 1, 1, tzinfo=UTC))),
        (Size, Size(1, 2)),
        (Names, {"first": "Ada"}),
        (dict[str, Any], {"a": [1, {"b": None}]}),
        (Renamed, Renamed(orderId=7)),
        (Point | None, Point(x=1)),
    ],
)
def test_outputs_come_back_as_the_annotated_type(annotation: Any, value: Any) -> None:
    task = task_returning(annotation)
    raw = task.encode_output(value)
    assert raw is not None
    assert task.decode_output(raw) == value


@pytest.mark.parametrize("value", [None, {}])
def test_none_and_empty_values_are_no_output(value: Any) -> None:
    assert task_returning(dict).encode_output(value) is None


@pytest.mark.parametrize(
    ("annotation", "value"), [(dict, {}), (Names | None, None), (EmptyModel, EmptyModel()), (None, None)]
)
def test_no_output_is_the_emptiest_value_of_the_type(annotation: Any, value: Any) -> None:
    assert task_returning(annotation).decode_output(None) == value


def test_an_unannotated_task_gives_its_fields_as_attributes() -> None:
    task = Sublet(ClientConfig()).task()(unannotated).task
    assert task.decode_output(b'{"x": 1}') == EmptyModel(x=1)


def test_values_inside_a_dictionary_are_written_as_pydantic_writes_them() -> None:
    raw = task_returning(dict).encode_output({"p": Point(x=1), "when": datetime(2026, 1, 1, tzinfo=UTC), "s": Size(1)})
    assert raw == b'{"p":{"x":1,"at":null},"when":"2026-01-01T00:00:00Z","s":{"width":1,"height":0}}'


def test_a_number_that_json_lacks_becomes_null() -> None:
    assert task_returning(dict).encode_output({"x": math.nan, "y": math.inf}) == b'{"x":null,"y":null}'


@pytest.mark.parametrize("value", ["text", 5, [1], ("a",), {1}, Point, Size, object()])
def test_a_task_must_return_an_object(value: Any) -> None:
    with pytest.raises(IllegalTaskOutputError, match=r"Task 't' returned a value of type .* it must return a diction"):
        task_returning(dict).encode_output(value)


def test_a_value_that_cannot_be_written_as_json_is_refused() -> None:
    with pytest.raises(IllegalTaskOutputError, match="output of task 't' cannot be written as JSON"):
        task_returning(dict).encode_output({"x": object()})
    circular: dict[str, Any] = {}
    circular["self"] = circular
    with pytest.raises(IllegalTaskOutputError, match="cannot be written as JSON"):
        task_returning(dict).encode_output(circular)


def test_a_serializer_that_fails_is_an_illegal_output_too() -> None:
    class Bad(BaseModel):
        x: int

        @field_serializer("x")
        def no(self, x: int) -> int:
            raise RuntimeError("no")

    with pytest.raises(IllegalTaskOutputError, match="cannot be written as JSON"):
        task_returning(Bad).encode_output(Bad(x=1))


@pytest.mark.parametrize("text", ["\0", "a\0b", "\\\0", "\\\\\0"])
def test_a_nul_character_is_refused_and_the_error_names_the_cure(text: str) -> None:
    with pytest.raises(IllegalTaskOutputError, match="remove_null_unicode_character"):
        task_returning(dict).encode_output({"x": text})
    assert task_returning(dict).encode_output(remove_null_unicode_character({"x": text})) is not None


@pytest.mark.parametrize("text", ["\\u0000", "a\\\\u0000"])
def test_an_escaped_backslash_is_not_a_nul_character(text: str) -> None:
    task = task_returning(dict[str, str])
    assert task.decode_output(task.encode_output({"x": text})) == {"x": text}


def test_an_output_over_the_limit_is_refused_with_size_and_limit() -> None:
    with pytest.raises(IllegalTaskOutputError, match=r"has 1,048,578 bytes of JSON; the limit is 1,048,576"):
        task_returning(dict).encode_output({"x": "y" * (PAYLOAD_MAX_BYTES - 6)})
    assert task_returning(dict).encode_output({"x": "y" * (PAYLOAD_MAX_BYTES - 8)}) is not None


def test_nul_characters_are_removed_at_any_depth() -> None:
    cleaned = remove_null_unicode_character({"a\0": ["b\0", ("c\0", 1)], "d": None}, "?")
    assert cleaned == {"a?": ["b?", ("c?", 1)], "d": None}


def test_models_see_in_the_context_that_sublet_serializes_them() -> None:
    class Careful(BaseModel):
        secret: str

        @field_serializer("secret")
        def hide(self, secret: str, info: Any) -> str:
            return "***" if is_in_sublet_serialization_context(info.context) else secret

    assert task_returning(Careful).encode_output(Careful(secret="x")) == b'{"secret":"***"}'
    assert Careful(secret="x").model_dump() == {"secret": "x"}


# --- inputs ---------------------------------------------------------------------------------------------------------


def item_input(input_validator: Any, *given: Any) -> str | None:
    task: Standalone[Any, Any] = Sublet(ClientConfig()).stubs.task(name="t", input_validator=input_validator)
    return task.create_bulk_run_item(*given).input


@pytest.mark.parametrize(
    ("input_validator", "given", "sent"),
    [
        (Point, Point(x=1), '{"x":1,"at":null}'),
        (Point, {"x": 1}, '{"x":1,"at":null}'),
        (Size, Size(1, 2), '{"width":1,"height":2}'),
        (Names, {"first": "Ada"}, '{"first":"Ada"}'),
        (dict, {"a": 1}, '{"a":1}'),
        (dict, Point(x=1), '{"x":1,"at":null}'),
        (None, {"a": 1}, '{"a":1}'),
        (None, Point(x=1), '{"x":1,"at":null}'),
        (None, Size(1), '{"width":1,"height":0}'),
        (None, None, "{}"),
        (Renamed, Renamed(orderId=1), '{"order_id":1}'),
    ],
)
def test_inputs_are_checked_and_written(input_validator: Any, given: Any, sent: str) -> None:
    assert item_input(input_validator, given) == sent


@pytest.mark.parametrize("raw", [b'{"orderId": 1}', b'{"order_id": 1}'])
def test_inputs_are_read_by_name_and_by_alias(raw: bytes) -> None:
    task = Sublet(ClientConfig()).task(name="t", input_validator=Renamed)(unannotated).task
    assert task.decode_input(raw).order_id == 1


def test_an_input_that_does_not_fit_is_refused_at_the_caller() -> None:
    with pytest.raises(ValidationError, match="x"):
        item_input(Point, {"x": "many"})


def test_a_missing_input_names_the_missing_fields() -> None:
    with pytest.raises(ValidationError, match="Field required"):
        item_input(Point)


def test_an_input_over_the_limit_is_refused_with_size_and_limit() -> None:
    with pytest.raises(ValueError, match=r"workflow 't' has 1,048,5\d\d bytes of JSON; the limit is 1,048,576"):
        item_input(dict, {"x": "y" * PAYLOAD_MAX_BYTES})


def test_metadata_over_the_limit_are_refused() -> None:
    task = Sublet(ClientConfig()).task(name="t", default_additional_metadata={"a": 1})(unannotated)
    with pytest.raises(ValueError, match=r"additional_metadata has .* the limit is 65,536"):
        task.run(additional_metadata={"x": "y" * 70_000})


# --- return types ---------------------------------------------------------------------------------------------------


def test_only_the_return_type_is_resolved() -> None:
    def fn(input: Undefined, ctx: AlsoUndefined) -> Point: ...  # type: ignore[name-defined,empty-body]  # noqa: F821

    assert Sublet(ClientConfig()).task()(fn).output_validator_type is Point


def test_a_return_type_that_cannot_be_resolved_is_refused_with_advice() -> None:
    def fn(input: Any, ctx: Any) -> Undefined: ...  # type: ignore[name-defined]  # noqa: F821

    with pytest.raises(TypeError, match=r"return type 'Undefined' of task 'fn' cannot be resolved .* define or import"):
        Sublet(ClientConfig()).task()(fn)


def test_a_return_type_may_be_local_if_the_function_uses_it() -> None:
    class Local(BaseModel):
        x: int

    def fn(input: Any, ctx: Any) -> Local:
        return Local(x=1)

    assert Sublet(ClientConfig()).task()(fn).output_validator_type is Local


def callable_object() -> Callable[..., Any]:
    class Doubler:
        async def __call__(self, input: Any, ctx: Any) -> dict[str, int]:
            return {}

    return Doubler()


def test_a_callable_object_is_a_task_if_it_is_given_a_name() -> None:
    with pytest.raises(TypeError, match="has no name of its own"):
        Sublet(ClientConfig()).task()(callable_object())
    assert Sublet(ClientConfig()).task(name="double")(callable_object()).is_async_function


def test_the_error_for_an_output_that_was_not_awaited_says_to_await_it() -> None:
    async def forgotten() -> None: ...

    coroutine: Any = forgotten()
    with pytest.raises(IllegalTaskOutputError, match="Await it"):
        task_returning(dict).encode_output(coroutine)
    coroutine.close()
