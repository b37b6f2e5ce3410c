"""`deploy/dead_letters.py` shows what nobody could handle, puts it back, or drops it."""

from __future__ import annotations

import asyncio
import os
import subprocess
import uuid
from pathlib import Path

import pytest
from deploy.localstack.places import ROOT, command

from acceptance.environment import Environment, eventually
from acceptance.raw_amqp import HEADERS_FLAG, MESSAGE_ID_FLAG, header_table, short, wire_client
from sublet_protocol.topology import DEAD

pytestmark = pytest.mark.real

LOOKS = 30
"""More than a queue of RabbitMQ 4 forgives that is not told how many."""


async def test_a_dead_letter_is_shown_with_its_reason_for_as_long_as_it_is_not_dropped(
    environment: Environment,
) -> None:
    body = f"no JSON {uuid.uuid4().hex}"
    await environment.publish_event("some.key", body.encode())
    await eventually(lambda: count(environment), "the letter is dead")
    for _ in range(LOOKS):
        await look(environment)
    shown = await dead_letters(environment, "show")
    assert f"sublet.events {environment.namespace}some.key" in shown
    assert "JSON" in shown
    assert body in shown
    assert body in await dead_letters(environment, "put-back")
    await eventually(lambda: count(environment), "the letter has died once more")
    assert body in await dead_letters(environment, "drop")
    assert await dead_letters(environment, "show") == "0 dead letters\n"


async def test_what_is_put_back_is_handled_as_if_it_came_for_the_first_time(environment: Environment) -> None:
    """Given up by a service because something was wrong that has been mended since."""
    await environment.worker("on_number", slots=1)
    origin = {
        "x-sublet-exchange": "sublet.events",
        "x-sublet-routing-key": f"{environment.namespace}number.one",
        "x-sublet-reason": "a mistake",
    }
    headers = {**origin, "colour": "red"}
    await environment.publish(DEAD, "", b'{"n": 1}', headers=headers, message_id=str(uuid.uuid4()))
    await eventually(lambda: count(environment), "the letter is dead")
    assert "a mistake" in await dead_letters(environment, "put-back")
    await environment.until_written("triggered", n=1)
    (triggered,) = environment.journal.entries("triggered")
    assert triggered["metadata"]["colour"] == "red"
    assert await count(environment) == 0


async def test_what_the_broker_itself_has_laid_there_is_shown_whatever_it_holds(environment: Environment) -> None:
    """Events that expired in the queue come as they were published; those that cannot be written again stay."""
    with wire_client(environment.stack.rabbit.url) as client:
        for flags, properties in (
            (MESSAGE_ID_FLAG, short(b"\xff\xfe")),
            (HEADERS_FLAG, header_table((b"\xff", b"T" + b"\xff" * 8))),
        ):
            assert client.publish(DEAD, b"", b"{}", flags, properties)
    assert (await dead_letters(environment, "show")).endswith("2 dead letters\n")
    assert (await dead_letters(environment, "put-back")).count("cannot be put back") == 2
    assert await dead_letters(environment, "drop") != "0 dead letters\n"
    assert await dead_letters(environment, "show") == "0 dead letters\n"


@pytest.fixture(autouse=True)
async def _emptied(environment: Environment) -> None:
    await dead_letters(environment, "drop")


async def dead_letters(environment: Environment, what: str) -> str:
    """What the program prints."""
    done = await asyncio.to_thread(
        subprocess.run,
        [command("python"), str(Path(ROOT, "deploy/dead_letters.py")), what],
        env=os.environ | environment.stack.variables,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


async def look(environment: Environment) -> None:
    """Take the letter from the queue, and leave without a word."""
    async with await environment.amqp() as connection:
        channel = await connection.channel()
        assert await (await channel.get_queue(DEAD)).get(fail=False)


async def count(environment: Environment) -> int:
    async with await environment.amqp() as connection:
        channel = await connection.channel()
        return (await channel.get_queue(DEAD)).declaration_result.message_count or 0
