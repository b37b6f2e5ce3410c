"""Gathering: what waits for the same place travels together, and fails together."""

from __future__ import annotations

import asyncio

import msgspec
import pytest

from sublet._client.outbox import Outbox
from sublet._errors import TransportUnavailable
from sublet_protocol import limits


class Line:
    """Publishes when it is let; remembers the bodies."""

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


async def test_a_lone_record_goes_at_once() -> None:
    line = Line()
    await Outbox(line.publish).send("a", [b"1"])
    assert line.bodies == [("a", [1])]


async def test_while_one_is_under_way_others_gather_for_each_key() -> None:
    line = Line()
    line.free.clear()
    outbox = Outbox(line.publish)
    sends = [asyncio.create_task(outbox.send(key, [b"%d" % n])) for n in range(1, 6) for key in ("a", "b")]
    await asyncio.sleep(0.01)
    assert [key for key, _ in line.bodies] == ["a", "b"]
    line.free.set()
    await asyncio.gather(*sends)
    for key in ("a", "b"):
        bodies = [body for k, body in line.bodies if k == key]
        assert [record for body in bodies for record in body] == [1, 2, 3, 4, 5]
        assert len(bodies) <= 2


async def test_nothing_is_nothing() -> None:
    line = Line()
    await Outbox(line.publish).send("a", [])
    assert line.bodies == []


async def test_messages_are_cut_by_count_and_by_size() -> None:
    line = Line()
    outbox = Outbox(line.publish)
    await outbox.send("a", [b"1"] * (limits.BATCH_MAX_ITEMS + 1))
    assert [len(body) for _, body in line.bodies] == [limits.BATCH_MAX_ITEMS, 1]
    line.bodies.clear()
    large = b'"%s"' % (b"x" * (limits.BATCH_MAX_BYTES // 2))
    huge = b'"%s"' % (b"x" * (limits.BATCH_MAX_BYTES * 2))
    await outbox.send("a", [large, large, huge, b"1"])
    assert [len(body) for _, body in line.bodies] == [1, 1, 1, 1]


async def test_a_failure_reaches_those_whose_records_it_held_and_nobody_else() -> None:
    line = Line()
    line.free.clear()
    line.error = TransportUnavailable("no")
    outbox = Outbox(line.publish)
    first = asyncio.create_task(outbox.send("a", [b"1", b"2"]))
    await asyncio.sleep(0.01)
    second = asyncio.create_task(outbox.send("a", [b"3"]))
    await asyncio.sleep(0.01)
    line.free.set()
    with pytest.raises(TransportUnavailable):
        await first
    line.error = None
    with pytest.raises(TransportUnavailable):
        await second
    await outbox.send("a", [b"4"])
    assert line.bodies[-1] == ("a", [4])


async def test_what_nobody_waits_for_any_more_is_not_sent() -> None:
    line = Line()
    line.free.clear()
    outbox = Outbox(line.publish)
    first = asyncio.create_task(outbox.send("a", [b"1"]))
    await asyncio.sleep(0.01)
    given_up = asyncio.create_task(outbox.send("a", [b"2"]))
    await asyncio.sleep(0.01)
    given_up.cancel()
    await asyncio.sleep(0.01)
    line.free.set()
    await first
    await outbox.send("a", [b"3"])
    assert [body for _, body in line.bodies] == [[1], [3]]
