"""Shows the dead letters (the queue ``sublet.dead``), requeues them or drops them.

    .venv/bin/python deploy/dead_letters.py show      show each dead letter with its reason; all stay in the queue
    .venv/bin/python deploy/dead_letters.py requeue   publish all to where they came from, after the cause is repaired
    .venv/bin/python deploy/dead_letters.py drop      delete all

SUBLET_AMQP_URL is the address of RabbitMQ, with a user who may read ``sublet.dead``.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from dataclasses import dataclass

import aio_pika
from aio_pika.abc import AbstractChannel, AbstractConnection, AbstractIncomingMessage
from aio_pika.exceptions import AMQPError

from sublet_platform.rabbit.decoding import lenient_decoding
from sublet_protocol.addresses import addresses

DEAD = "sublet.dead"
SHOWN_BYTES = 200


@dataclass(frozen=True)
class Origin:
    """The exchange and routing key of a message when it failed, and the reason."""

    exchange: str
    routing_key: str
    reason: str


def origin_of(message: AbstractIncomingMessage) -> Origin:
    """Read from the headers of the service that dead-lettered the message, or from those of RabbitMQ."""
    headers = message.headers
    if "x-sublet-reason" in headers:
        return Origin(*(str(headers[f"x-sublet-{name}"]) for name in ("exchange", "routing-key", "reason")))
    reason = str(headers.get("x-first-death-reason", "unknown"))
    return Origin("", str(headers.get("x-first-death-queue", "")), f"RabbitMQ: {reason}")


async def letters(channel: AbstractChannel) -> AsyncIterator[AbstractIncomingMessage]:
    """The messages in the queue. Those that are not acknowledged stay there."""
    queue = await channel.get_queue(DEAD)
    for _ in range(queue.declaration_result.message_count or 0):
        message = await queue.get(fail=False)
        if message is None:
            return
        yield message


def show(message: AbstractIncomingMessage, origin: Origin) -> None:
    line = f"{origin.exchange or '(queue)'} {origin.routing_key}, {len(message.body):,} bytes: {origin.reason}"
    print(line.encode(errors="backslashreplace").decode())
    print(f"    {message.body[:SHOWN_BYTES].decode(errors='replace')}")


async def requeue(channel: AbstractChannel, message: AbstractIncomingMessage, origin: Origin) -> bool:
    """Publish a message unchanged to where it came from. Raises if no queue receives it. False if RabbitMQ itself
    dead-lettered the message and it has properties that AMQP clients cannot write."""
    headers = {name: value for name, value in message.headers.items() if not name.startswith("x-")}
    again = aio_pika.Message(
        message.body,
        headers=headers,
        message_id=message.message_id,
        content_type=message.content_type,
        delivery_mode=aio_pika.DeliveryMode.PERSISTENT,
    )
    exchange = (
        await channel.get_exchange(origin.exchange, ensure=False) if origin.exchange else channel.default_exchange
    )
    try:
        await exchange.publish(again, routing_key=origin.routing_key, mandatory=True)
    except (TypeError, UnicodeEncodeError) as error:
        print(f"    cannot be requeued: {error}")
        return False
    return True


async def connect(urls: str) -> AbstractConnection:
    """Connect to the first node that answers."""
    *others, last = addresses(urls)
    for url in others:
        with contextlib.suppress(OSError, AMQPError):
            return await aio_pika.connect(url)
    return await aio_pika.connect(last)


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("show", "requeue", "drop"))
    what = parser.parse_args().what
    count = 0
    lenient_decoding()
    async with await connect(os.environ["SUBLET_AMQP_URL"]) as connection:
        channel = await connection.channel(on_return_raises=True)
        async for message in letters(channel):
            origin = origin_of(message)
            show(message, origin)
            if what == "drop" or (what == "requeue" and await requeue(channel, message, origin)):
                await message.ack()
            count += 1
    print(f"{count} dead letters" + {"show": "", "requeue": ", requeued", "drop": ", dropped"}[what])


if __name__ == "__main__":
    asyncio.run(main())
