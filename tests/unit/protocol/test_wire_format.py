"""The encoded form of messages and of stored runs, compared with ``wire_format.golden``.

A change of that form breaks messages under way, stored runs and processes of an older version. Renamed classes, fields
and parameters must not cause one by accident.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from contract import records
from fuzz import examples
from sublet_engine.run import state
from sublet_platform.mongo.run_documents import document_of
from sublet_protocol import destinations, messages, specs

GOLDEN = Path(__file__).with_name("wire_format.golden")
CURE = """{name} is encoded in another way than wire_format.golden says.

golden:  {golden}
now:     {now}

If you renamed something, keep the old name in the encoded form: `msgspec.field(name="old")`, or the old `tag="old"`.
If you added a field that has a default, older versions can still read the message.
If the form has to change, raise `sublet_protocol.topology.FORMAT`, so that other versions refuse to start.
In the last two cases rewrite the file: `PYTHONPATH=tests .venv/bin/python tests/unit/protocol/test_wire_format.py`.
"""


def structs() -> Iterator[type[msgspec.Struct]]:
    """Every record that is sent or stored."""
    for module in (destinations, messages, specs, state):
        for _, struct in inspect.getmembers(module, inspect.isclass):
            if issubclass(struct, msgspec.Struct) and struct.__module__ == module.__name__:
                yield struct


def kind_of(struct: type[msgspec.Struct]) -> str:
    """The tag, because a class with a tag may be renamed; else the name of the class."""
    return str(struct.__struct_config__.tag or struct.__name__)


def example_records() -> Iterator[msgspec.Struct]:
    yield from (*examples.TO_SHARD, *examples.TO_WORKER, *examples.TO_CLIENT, *examples.TO_TIMER, *examples.TO_INGEST)
    yield examples.QUERIES[0]
    yield messages.decode_ticket(examples.TICKET)
    yield messages.TaskNotice(examples.RUN, examples.TASK_RUN, "flow", "t", "FAILED", 1.0, "reason")
    yield records.a_full_run()
    yield records.a_log_record(
        examples.TASK_RUN, 3, fingerprint="f", asked="asked", label="label", result="1", error=records.ERROR,
        child_run_id=examples.RUN, order=2, position=5, version="1", retry_count=1,
    )  # fmt: skip


def encoded_forms() -> dict[str, str]:
    forms = {f"fields of {kind_of(struct)}": " ".join(struct.__struct_encode_fields__) for struct in structs()}
    for record in example_records():
        stored = document_of(record) if isinstance(record, state.Run) else record
        forms[f"example of {kind_of(type(record))}"] = msgspec.json.encode(stored).decode()
    return dict(sorted(forms.items()))


def golden_forms() -> dict[str, str]:
    lines = GOLDEN.read_text().splitlines() if GOLDEN.exists() else []
    return dict(zip(lines[::3], (line.removeprefix("    ") for line in lines[1::3]), strict=True))


def parsed(name: str, form: str | None) -> object:
    """Without the order of object members, which does not matter."""
    if form is None or name.startswith("fields"):
        return form and sorted(form.split())
    return json.loads(form)


@pytest.mark.parametrize("name", sorted({*encoded_forms(), *golden_forms()}))
def test_encoded_form_is_that_of_the_golden_file(name: str) -> None:
    golden, now = golden_forms().get(name), encoded_forms().get(name)
    assert parsed(name, golden) == parsed(name, now), CURE.format(name=name, golden=golden, now=now)


def test_every_message_kind_has_an_example() -> None:
    kinds = {struct for struct in structs() if issubclass(struct, messages.Record) and struct is not messages.Record}

    assert {type(record) for record in example_records()} >= kinds


def test_every_example_can_be_decoded() -> None:
    for record in example_records():
        assert msgspec.json.decode(msgspec.json.encode(record), type=type(record)) == record


if __name__ == "__main__":
    GOLDEN.write_text("\n".join(f"{name}\n    {form}\n" for name, form in encoded_forms().items()))
