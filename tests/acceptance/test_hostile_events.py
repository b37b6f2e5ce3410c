"""A hostile publisher of events: the events of all others arrive, and the services stay healthy."""

from __future__ import annotations

import json
import struct
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from random import Random

import aio_pika
import pytest

from acceptance.environment import Environment, eventually
from acceptance.processes import Process
from acceptance.raw_amqp import HEADERS_FLAG, MESSAGE_ID_FLAG, TIMESTAMP_FLAG, header_table, long, short, wire_client
from acceptance.restricted_users import PUBLISHER, GuardedStack, guarded_stack
from acceptance.stack import Stack
from fuzz.examples import EVENTS
from fuzz.mutation import mutated
from sublet_protocol import limits

pytestmark = pytest.mark.real

SEED = 20_260_417
HOSTILE = 300
GOOD_EVERY = 10
GROWTH_MAX_BYTES = 400 * 1_048_576
"""The memory of a service under attack: its share of a flood, and memory that Python does not release."""


def nested(levels: int) -> bytes:
    table = b""
    for _ in range(levels):
        table = short(b"k") + b"F" + long(table)
    return long(table)


def of_header(name: bytes, value: bytes) -> tuple[int, bytes]:
    return HEADERS_FLAG, header_table((name, value))


PROPERTIES: dict[str, tuple[int, bytes]] = {
    "a message id that is no UTF-8": (MESSAGE_ID_FLAG, short(b"\xff\xfe")),
    "a time beyond all calendars": (TIMESTAMP_FLAG, struct.pack(">Q", 2**63 + 5)),
    "a header's name that is no UTF-8": of_header(b"\xff\xfe", b"S" + long(b"x")),
    "a header that is no UTF-8": of_header(b"t", b"S" + long(b"\xff\xfe")),
    "a header with such a time": of_header(b"t", b"T" + struct.pack(">Q", 2**63 + 5)),
    "a header with a decimal number": of_header(b"t", b"D\xff" + struct.pack(">I", 2**32 - 1)),
    "a priority that is a table": of_header(b"priority", b"F" + header_table()),
    "a priority that is a fraction": of_header(b"priority", b"d" + struct.pack(">d", 2.5)),
    "a scope that is a list": of_header(b"scope", b"A" + long(b"t\1")),
    "headers nested 3,000 deep": (HEADERS_FLAG, nested(3_000)),
    "headers that fill a frame": of_header(b"t", b"S" + long(b"x" * 130_900)),
    "15,000 headers": (HEADERS_FLAG, header_table(*((b"%d" % n, b"V") for n in range(15_000)))),
    "a list of 100,000 nothings": of_header(b"t", b"A" + long(b"V" * 100_000)),
    "a name as long as can be": of_header(b"k" * 255, b"S" + long(b"x")),
    "copies to other keys": of_header(b"CC", b"A" + long(b"S" + long(b"elsewhere"))),
    "a forged death": of_header(b"x-death", b"I\0\0\0\1"),
}
KEYS: dict[str, bytes] = {
    "no key": b"",
    "a key that is no UTF-8": b"number.\xff\xfe",
    "a key that is too long": b"k" * 255,
    "a key with control characters": b"number.\0\n",
    "a key of dots": b"." * 100,
}
REFUSED = (
    *("a message id that is no UTF-8", "a header's name that is no UTF-8", "a header that is no UTF-8"),
    *("a header with such a time", "a header with a decimal number", "a priority that is a table"),
    *("a priority that is a fraction", "a scope that is a list", "headers nested 3,000 deep"),
    *("headers that fill a frame", "15,000 headers", "a list of 100,000 nothings"),
    *("no key", "a key that is no UTF-8", "a key that is too long"),
)
"""The others are odd, and events nevertheless."""


@pytest.fixture(scope="module")
def stack(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[GuardedStack]:
    """One of its own: what its services hold, and what is among the dead, is of these tests alone."""
    with guarded_stack(tmp_path_factory.mktemp("hostile")) as own:
        yield own


async def test_each_unusual_message_is_an_event_or_a_dead_letter_and_the_messages_after_it_are_handled(
    environment: Environment, stack: GuardedStack
) -> None:
    await environment.worker("on_number", slots=1)
    refused: list[bytes] = []
    with wire_client(stack.url(PUBLISHER)) as client:
        for place, name in enumerate([*PROPERTIES, *KEYS]):
            marker = uuid.uuid4().hex.encode()
            flags, properties = PROPERTIES.get(name, (0, b""))
            key = KEYS.get(name, environment.namespace.encode() + b"odd")
            assert client.publish("sublet.events", key, b'{"marker": "%s"}' % marker, flags, properties), name
            assert client.publish("sublet.events", f"{environment.namespace}number.x".encode(), b'{"n": %d}' % place)
            if name in REFUSED:
                refused.append(marker)
    for place in range(len(PROPERTIES) + len(KEYS)):
        await environment.until_written("triggered", n=place)
    letters = [letter async for letter in dead_letters(stack)]
    for name, marker in zip(REFUSED, sorted(refused, key=refused.index), strict=True):
        (letter,) = [each for each in letters if marker in each.body]
        assert str(letter.headers["x-sublet-reason"]).startswith("not an event: "), name
    assert len(letters) == len(refused)
    assert all(process.ready for process in stack.processes)


async def test_hundreds_of_mutations_among_good_events_harm_none_of_them(
    environment: Environment, stack: GuardedStack
) -> None:
    await environment.worker("on_number", slots=1)
    before = {process: resident_bytes(process) for process in stack.processes}
    handled = stack.metric("event-ingest", "sublet_events_total")
    dead = stack.metric("event-ingest", "sublet_events_total", outcome="refused")
    chance = Random(SEED)
    published = 0
    with wire_client(stack.url(PUBLISHER)) as client:
        for place in range(HOSTILE):
            body = mutated(chance.choice(EVENTS), chance)
            flags, properties = PROPERTIES[chance.choice(list(PROPERTIES))] if chance.random() < 0.5 else (0, b"")
            assert client.publish("sublet.events", f"{environment.namespace}odd".encode(), body, flags, properties)
            published += 1
            if place % GOOD_EVERY == 0:
                assert client.publish(
                    "sublet.events", f"{environment.namespace}number.x".encode(), b'{"n": %d}' % place
                )
                published += 1
    for place in range(0, HOSTILE, GOOD_EVERY):
        await environment.until_written("triggered", n=place)
    await eventually(
        lambda: stack.metric("event-ingest", "sublet_events_total") - handled == published, "every event is settled"
    )
    assert stack.metric("event-ingest", "sublet_events_total", outcome="refused") - dead > HOSTILE / 4
    async for letter in dead_letters(stack):
        assert letter.headers["x-sublet-reason"]
    stay_well(stack, before)


async def test_a_flood_of_the_largest_messages_does_not_fill_the_memory(
    environment: Environment, stack: GuardedStack
) -> None:
    await environment.worker("on_number", slots=1)
    before = {process: resident_bytes(process) for process in stack.processes}
    peak = dict(before)
    largest = json.dumps({"x": "y" * (limits.PAYLOAD_MAX_BYTES - 100)}).encode()
    too_large = b'{"x": "' + b"y" * (16 * limits.PAYLOAD_MAX_BYTES - 100) + b'"}'
    async with await aio_pika.connect(stack.url(PUBLISHER)) as connection:
        events = await (await connection.channel()).get_exchange("sublet.events", ensure=False)
        for place in range(60):
            body = too_large if place % 4 == 0 else largest
            await events.publish(aio_pika.Message(body), f"{environment.namespace}large")
            peak = {process: max(bytes_, resident_bytes(process)) for process, bytes_ in peak.items()}
    await environment.publish_event("number.after", b'{"n": 1}')
    await environment.until_written("triggered", n=1)
    for process, most in peak.items():
        assert most - before[process] < GROWTH_MAX_BYTES, process
    stay_well(stack, before)


def stay_well(stack: Stack, before: dict[Process, int]) -> None:
    for process, bytes_ in before.items():
        assert process.ready, process.last_words()
        assert resident_bytes(process) - bytes_ < GROWTH_MAX_BYTES, process


def resident_bytes(process: Process) -> int:
    status = Path(f"/proc/{process.pid}/status").read_text()
    (line,) = [line for line in status.splitlines() if line.startswith("VmRSS:")]
    return int(line.split()[1]) * 1_024


async def dead_letters(stack: Stack) -> AsyncIterator[aio_pika.abc.AbstractIncomingMessage]:
    """All of them, taken out."""
    async with await aio_pika.connect(stack.rabbit.url) as connection:
        queue = await (await connection.channel()).get_queue("sublet.dead")
        while (letter := await queue.get(fail=False, no_ack=True)) is not None:
            yield letter
