"""`deploy/dead_letters.py` shows dead letters, requeues them, or drops them."""

from __future__ import annotations

import asyncio
import os
import subprocess
import uuid
from pathlib import Path

import pytest
from deploy.localstack.paths import ROOT, command

from acceptance.environment import Environment, eventually
from acceptance.raw_amqp import HEADERS_FLAG, MESSAGE_ID_FLAG, header_table, short, wire_client
from sublet_protocol.topology import DEAD

pytestmark = pytest.mark.real

LOOKS = 30
"""More requeues than the default delivery limit of a queue in RabbitMQ 4 allows."""


async def test_a_dead_letter_is_shown_with_its_reason_until_it_is_dropped(
    environment: Environment,
) -> None:
    body = f"no JSON {uuid.uuid4().hex}"
    await environment.publish_event("some.key", body.encode())
    await eventually(lambda: count(environment), "the message is dead-lettered")
    for _ in range(LOOKS):
        await look(environment)
    shown = await dead_letters(environment, "show")
    assert f"sublet.events {environment.namespace}some.key" in shown
    assert "JSON" in shown
    assert body in shown
    assert body in await dead_letters(environment, "requeue")
    await eventually(lambda: count(environment), "the message is dead-lettered again")
    assert body in await dead_letters(environment, "drop")
    assert await dead_letters(environment, "show") == "0 dead letters\n"


async def test_a_requeued_dead_letter_is_handled_like_a_new_message(environment: Environment) -> None:
    """A service dead-lettered the message for a cause that has been repaired since."""
    await environment.worker("on_number", slots=1)
    origin = {
        "x-sublet-exchange": "sublet.events",
        "x-sublet-routing-key": f"{environment.namespace}number.one",
        "x-sublet-reason": "a mistake",
    }
    headers = {**origin, "colour": "red"}
    await environment.publish(DEAD, "", b'{"n": 1}', headers=headers, message_id=str(uuid.uuid4()))
    await eventually(lambda: count(environment), "the message is dead-lettered")
    assert "a mistake" in await dead_letters(environment, "requeue")
    await environment.until_written("triggered", n=1)
    (triggered,) = environment.journal.entries("triggered")
    assert triggered["metadata"]["colour"] == "red"
    assert await count(environment) == 0


async def test_messages_that_the_broker_dead_lettered_are_shown_with_any_content(environment: Environment) -> None:
    """Events that expired in their queue arrive unchanged. Those that a client cannot publish again stay."""
    with wire_client(environment.stack.rabbit.url) as client:
        for flags, properties in (
            (MESSAGE_ID_FLAG, short(b"\xff\xfe")),
            (HEADERS_FLAG, header_table((b"\xff", b"T" + b"\xff" * 8))),
        ):
            assert client.publish(DEAD, b"", b"{}", flags, properties)
    assert (await dead_letters(environment, "show")).endswith("2 dead letters\n")
    assert (await dead_letters(environment, "requeue")).count("cannot be requeued") == 2
    assert await dead_letters(environment, "drop") != "0 dead letters\n"
    assert await dead_letters(environment, "show") == "0 dead letters\n"


@pytest.fixture(autouse=True)
async def _emptied(environment: Environment) -> None:
    await dead_letters(environment, "drop")


async def dead_letters(environment: Environment, what: str) -> str:
    """The output of the program."""
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
    """Take the dead letter from the queue, and disconnect without an acknowledgement."""
    async with await environment.amqp() as connection:
        channel = await connection.channel()
        assert await (await channel.get_queue(DEAD)).get(fail=False)


async def count(environment: Environment) -> int:
    async with await environment.amqp() as connection:
        channel = await connection.channel()
        return (await channel.get_queue(DEAD)).declaration_result.message_count or 0
