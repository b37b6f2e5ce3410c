"""`BatchPublisher`: records for one routing key form few messages, and succeed or fail together."""

from __future__ import annotations

import asyncio

import msgspec
import pytest

from sublet._amqp.publisher import BatchPublisher
from sublet._errors import TransportUnavailable
from sublet_protocol import limits


class FakePublish:
    """A `Publish` function that confirms while ``free`` is set, and records the bodies."""

    def __init__(self) -> None:
        self.free = asyncio.Event()
        self.free.set()
        self.bodies: list[tuple[str, list[int | str]]] = []
        self.error: Exception | None = None

    async def publish(self, key: str, body: bytes) -> None:
        self.bodies.append((key, msgspec.json.decode(body)))
        await self.free.wait()
        if self.error is not None:
            raise self.error


async def test_a_single_record_is_published_at_once() -> None:
    fake = FakePublish()
    await BatchPublisher(fake.publish, drop_cancelled=True).send("a", [b"1"])
    assert fake.bodies == [("a", [1])]


async def test_records_gather_while_a_message_for_their_routing_key_is_unconfirmed() -> None:
    fake = FakePublish()
    fake.free.clear()
    publisher = BatchPublisher(fake.publish, drop_cancelled=True)
    sends = [asyncio.create_task(publisher.send(key, [b"%d" % n])) for n in range(1, 6) for key in ("a", "b")]
    await asyncio.sleep(0.01)
    assert [key for key, _ in fake.bodies] == ["a", "b"]
    fake.free.set()
    await asyncio.gather(*sends)
    for key in ("a", "b"):
        bodies = [body for k, body in fake.bodies if k == key]
        assert [record for body in bodies for record in body] == [1, 2, 3, 4, 5]
        assert len(bodies) <= 2


async def test_no_records_publish_no_message() -> None:
    fake = FakePublish()
    await BatchPublisher(fake.publish, drop_cancelled=True).send("a", [])
    assert fake.bodies == []


async def test_messages_are_limited_by_count_and_by_bytes() -> None:
    fake = FakePublish()
    publisher = BatchPublisher(fake.publish, drop_cancelled=True)
    await publisher.send("a", [b"1"] * (limits.BATCH_MAX_ITEMS + 1))
    assert [len(body) for _, body in fake.bodies] == [limits.BATCH_MAX_ITEMS, 1]
    fake.bodies.clear()
    large = b'"%s"' % (b"x" * (limits.BATCH_MAX_BYTES // 2))
    huge = b'"%s"' % (b"x" * (limits.BATCH_MAX_BYTES * 2))
    await publisher.send("a", [large, large, huge, b"1"])
    assert [len(body) for _, body in fake.bodies] == [1, 1, 1, 1]


async def test_an_error_reaches_only_the_callers_whose_records_were_in_the_message() -> None:
    fake = FakePublish()
    fake.free.clear()
    fake.error = TransportUnavailable("no")
    publisher = BatchPublisher(fake.publish, drop_cancelled=True)
    first = asyncio.create_task(publisher.send("a", [b"1", b"2"]))
    await asyncio.sleep(0.01)
    second = asyncio.create_task(publisher.send("a", [b"3"]))
    await asyncio.sleep(0.01)
    fake.free.set()
    with pytest.raises(TransportUnavailable):
        await first
    fake.error = None
    with pytest.raises(TransportUnavailable):
        await second
    await publisher.send("a", [b"4"])
    assert fake.bodies[-1] == ("a", [4])


async def test_a_record_whose_caller_was_cancelled_is_not_published() -> None:
    fake = FakePublish()
    fake.free.clear()
    publisher = BatchPublisher(fake.publish, drop_cancelled=True)
    first = asyncio.create_task(publisher.send("a", [b"1"]))
    await asyncio.sleep(0.01)
    given_up = asyncio.create_task(publisher.send("a", [b"2"]))
    await asyncio.sleep(0.01)
    given_up.cancel()
    await asyncio.sleep(0.01)
    fake.free.set()
    await first
    await publisher.send("a", [b"3"])
    assert [body for _, body in fake.bodies] == [[1], [3]]


async def test_a_record_of_a_cancelled_caller_is_published_if_records_must_not_be_lost() -> None:
    fake = FakePublish()
    fake.free.clear()
    publisher = BatchPublisher(fake.publish, drop_cancelled=False)
    publisher.add("a", b"1")
    await asyncio.sleep(0.01)
    publisher.add("a", b"2").cancel()
    fake.free.set()
    await publisher.send("a", [b"3"])
    assert [body for _, body in fake.bodies] == [[1], [2, 3]]
    assert publisher.idle


async def test_a_closed_publisher_keeps_no_routing_key_busy() -> None:
    fake = FakePublish()
    fake.free.clear()
    publisher = BatchPublisher(fake.publish, drop_cancelled=True)
    publisher.add("a", b"1")
    await asyncio.sleep(0.01)
    assert not publisher.idle
    publisher.close()
    await asyncio.sleep(0.01)
    assert publisher.idle
    fake.free.set()
    await publisher.send("a", [b"2"])
    assert fake.bodies[-1] == ("a", [2])
