"""Converts between JSON and the types of users: inputs and outputs of tasks, metadata, event payloads, exceptions."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Generic, TypeVar

import pydantic_core
from pydantic import BaseModel, TypeAdapter, ValidationError

from sublet._errors import IllegalTaskOutputError, TaskRunError
from sublet_protocol import limits
from sublet_protocol.messages import TaskError

T = TypeVar("T")

_CONTEXT = {"is_sublet_serialization_context": True}
# An escaped NUL: "\u0000" after an even number of backslashes.
_NUL = re.compile(rb"(?<!\\)(?:\\\\)*\\u0000")


def is_in_sublet_serialization_context(context: object) -> bool:
    """True if ``context`` is the pydantic ``info.context`` of a validator or serializer that Sublet runs.

    So a model can be written in another way for Sublet than elsewhere.
    """
    return isinstance(context, Mapping) and bool(context.get("is_sublet_serialization_context"))


def remove_null_unicode_character(data: Any, replacement: str = "") -> Any:
    """A copy of texts, dictionaries and lists, at any depth, with each NUL character replaced.

    Outputs of tasks must not contain NUL characters (`IllegalTaskOutputError`).
    """
    if isinstance(data, str):
        return data.replace("\0", replacement)
    if isinstance(data, Mapping):
        return {
            remove_null_unicode_character(key, replacement): remove_null_unicode_character(value, replacement)
            for key, value in data.items()
        }
    if isinstance(data, list | tuple):
        return type(data)(remove_null_unicode_character(item, replacement) for item in data)
    return data


class Codec(Generic[T]):
    """Converts one type of user data to JSON and back.

    Models are written with the names of their fields. Names and aliases are both accepted when reading, so that
    programs which know only the aliases can start runs.
    """

    def __init__(self, type_: Any) -> None:
        self.type = type_
        self.adapter: TypeAdapter[T] = TypeAdapter(type_)

    def check(self, value: object) -> T:
        """Validate a value against this type. A model or dataclass of another type is read as a dictionary.

        Raises:
            ValidationError: the value does not fit the type.
        """
        if isinstance(value, BaseModel) and not self._is(value):
            value = value.model_dump()
        elif dataclasses.is_dataclass(value) and not isinstance(value, type) and not self._is(value):
            value = dataclasses.asdict(value)
        return self.adapter.validate_python(value, context=_CONTEXT, by_alias=True, by_name=True)

    def encode(self, value: T) -> bytes:
        return self.adapter.dump_json(value, context=_CONTEXT, by_alias=False)

    def decode(self, raw: bytes) -> T:
        """
        Raises:
            ValidationError: the JSON does not fit the type.
        """
        return self.adapter.validate_json(raw, context=_CONTEXT, by_alias=True, by_name=True)

    def decode_or_empty(self, raw: bytes | None) -> T:
        """Like `decode`. No output (None) becomes None if the type allows it, else an empty object."""
        if self.type is type(None):
            return None  # type: ignore[return-value]  # T is None here
        if raw is not None and raw != b"null":
            return self.decode(raw)
        try:
            return self.adapter.validate_python(None, context=_CONTEXT)
        except ValidationError:
            return self.adapter.validate_python({}, context=_CONTEXT)

    def _is(self, value: object) -> bool:
        return isinstance(self.type, type) and isinstance(value, self.type)


@lru_cache(maxsize=1024)
def _codec_of(type_: Any) -> Codec[Any]:
    return Codec(type_)


def encode_output(value: object, task: str) -> bytes | None:
    """Convert the output of a task to JSON. None and an empty dictionary become None. ``task`` is its name.

    Raises:
        IllegalTaskOutputError: the output is not a dictionary, model, dataclass or None; it cannot be written as JSON;
            it contains a NUL character; or its JSON is larger than `limits.PAYLOAD_MAX_BYTES`.
    """
    if value is None or value == {}:
        return None
    is_dataclass = dataclasses.is_dataclass(value) and not isinstance(value, type)
    if not (isinstance(value, BaseModel | Mapping) or is_dataclass):
        cure = "Await it." if inspect.isawaitable(value) else 'Wrap it: return {"result": value}.'
        raise IllegalTaskOutputError(
            f"Task {task!r} returned a value of type {type(value).__name__}; it must return a dictionary, a pydantic"
            f" model, a dataclass or None. {cure}"
        )
    try:
        if isinstance(value, Mapping):
            raw = pydantic_core.to_json(dict(value), context=_CONTEXT, by_alias=False, inf_nan_mode="null")
        else:
            type_: Any = type(value)
            raw = _codec_of(type_).encode(value)
    except Exception as error:  # serializers are user code, which can raise any exception
        raise IllegalTaskOutputError(f"The output of task {task!r} cannot be written as JSON: {error}") from error
    if b"\\u0000" in raw and _NUL.search(raw):
        raise IllegalTaskOutputError(
            f"The output of task {task!r} holds a NUL character (\\u0000), which cannot be stored."
            " sublet.remove_null_unicode_character(output) takes them out."
        )
    if len(raw) > limits.PAYLOAD_MAX_BYTES:
        raise IllegalTaskOutputError(too_large(f"The output of task {task!r}", len(raw), limits.PAYLOAD_MAX_BYTES))
    return raw


def encode_object(value: Mapping[str, Any], what: str, limit_bytes: int) -> bytes:
    """Convert metadata, or the payload of an event, to a JSON object. ``what`` names it in errors.

    Raises:
        TypeError: the value is not a mapping.
        ValueError: the value cannot be written as JSON, or is too large.
    """
    if not isinstance(value, Mapping):
        raise TypeError(f"{what} must be a dictionary, not {type(value).__name__}")
    try:
        raw = pydantic_core.to_json(dict(value), context=_CONTEXT, by_alias=False, inf_nan_mode="null")
    except Exception as error:
        raise ValueError(f"{what} cannot be written as JSON: {error}") from error
    check_size(raw, what, limit_bytes)
    return raw


def task_error(error: BaseException, task_run_id: str) -> TaskError:
    """An exception of a task as a message.

    Text and trace are cut to `limits.ERROR_TEXT_MAX_CHARS` characters. The end of a long trace is kept, because it
    shows where the exception was raised.
    """
    failed = TaskRunError.from_exception(error, task_run_id)
    return TaskError(
        type=failed.exc_type,
        message=failed.exc[: limits.ERROR_TEXT_MAX_CHARS],
        trace=failed.trace[-limits.ERROR_TEXT_MAX_CHARS :],
        task_run_id=task_run_id,
    )


def check_size(raw: bytes, what: str, limit_bytes: int) -> None:
    if len(raw) > limit_bytes:
        raise ValueError(too_large(what, len(raw), limit_bytes))


def too_large(what: str, size_bytes: int, limit_bytes: int) -> str:
    return (
        f"{what} has {size_bytes:,} bytes of JSON; the limit is {limit_bytes:,}. "
        "Put what is larger into an object store, and pass a reference to it."
    )


def check_name(name: str, what: str) -> str:
    """Return the name unchanged if it is valid. ``what`` says in errors what it is the name of.

    Raises:
        TypeError: the name is not a text.
        ValueError: the name is empty, longer than `limits.NAME_MAX_CHARS` or `limits.NAME_MAX_BYTES`, or contains
            control characters.
    """
    if not isinstance(name, str):
        raise TypeError(f"{what} must be a text, not {type(name).__name__}")
    if not name:
        raise ValueError(f"{what} must not be empty")
    if len(name) > limits.NAME_MAX_CHARS:
        raise ValueError(f"{what} has {len(name)} characters; the limit is {limits.NAME_MAX_CHARS}: {name[:40]!r}…")
    size_bytes = len(name.encode())
    if size_bytes > limits.NAME_MAX_BYTES:
        raise ValueError(f"{what} has {size_bytes} bytes in UTF-8; the limit is {limits.NAME_MAX_BYTES}: {name!r}")
    if any(ord(character) < 32 or ord(character) == 127 for character in name):
        raise ValueError(f"{what} must not hold control characters: {name!r}")
    return name
