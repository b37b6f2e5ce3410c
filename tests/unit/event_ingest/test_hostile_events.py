"""Event-ingest among messages that mean harm: what they can cost, and whom."""

from __future__ import annotations

import asyncio
import json

import pytest

from sublet_platform.ports import Delivery, Outgoing
from sublet_protocol import limits
from sublet_protocol.cel.cost import extent_of, read_cost
from sublet_protocol.messages import encode
from sublet_protocol.topology import EVENTS, INGEST
from support.ingest_harness import IngestHarness, settled, wait
from support.virtual_time import EPOCH_S, in_virtual_time

DEAR = "input.a.map(x, input.a.map(y, input.s + input.s)).size() > 0"


@in_virtual_time
async def test_an_expression_too_dear_for_an_event_costs_nothing_and_the_other_waits_are_told() -> None:
    world, (instance,) = await IngestHarness.begin()
    payload = {"a": list(range(3_000)), "s": "x" * 500_000, "n": 1}
    assert read_cost(DEAR).work(extent_of([payload])) > limits.EXPRESSION_WORK_MAX_BYTES
    await world.command(*(wait(f"dear-{place}", DEAR) for place in range(50)))
    await world.command(wait("cheap", "input.n == 1 && input.s != ''"), wait("indexed", "input.n == 1"))
    await world.publish(payload)
    await settled(instance)
    assert world.woken.keys() == {"cheap.t", "indexed.t"}
    assert instance.value("sublet_expression_failures_total") == 50


@in_virtual_time
async def test_an_event_too_large_is_kept_no_longer_than_it_takes_to_see_that() -> None:
    world, (instance,) = await IngestHarness.begin()
    size = 8 * limits.PAYLOAD_MAX_BYTES
    await world.user.publish([Outgoing(EVENTS, "paid", b'{"x": "' + b"y" * size + b'"}', message_id="large")])
    await world.publish({"n": 1})
    await settled(instance)
    (letter,) = world.dead
    assert "at most 1,048,576 bytes" in str(letter.headers["x-sublet-reason"])
    assert (letter.message_id, letter.headers["x-sublet-routing-key"]) == ("large", "paid")
    assert len(letter.body) == limits.PAYLOAD_MAX_BYTES + 1, "enough to be refused again, were it put back"
    assert [json.loads(event.payload) for event in world.database.events.values()] == [{"n": 1}]


@in_virtual_time
async def test_a_flood_of_events_is_held_up_to_a_number_of_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    world, (instance,) = await IngestHarness.begin()
    held: dict[int, int] = {}
    handle, ack = instance.shell._batches.handle, instance.broker.ack

    def count(delivery: Delivery) -> None:
        held[delivery.tag] = len(delivery.body)
        peaks.append(sum(held.values()))
        handle(delivery)

    def settle(deliveries: list[Delivery]) -> None:
        for delivery in deliveries:
            held.pop(delivery.tag, None)
        ack(deliveries)

    peaks: list[int] = []
    monkeypatch.setattr(limits, "PAYLOAD_MAX_BYTES", 1_000)
    monkeypatch.setattr(instance.shell._batches, "handle", count)
    monkeypatch.setattr(instance.broker, "ack", settle)
    world.database.before = _slow
    flood = limits.EVENT_PREFETCH * 3
    await world.user.publish([Outgoing(EVENTS, "flood", b'{"x":"' + b"y" * 5_000 + b'"}') for _ in range(flood)])
    await settled(instance, seconds=600.0)
    assert len(peaks) == flood == len(world.dead)
    assert max(peaks) <= limits.EVENT_PREFETCH * (limits.PAYLOAD_MAX_BYTES + 1)
    assert not held


async def _slow(operation: str) -> None:
    await asyncio.sleep(0.1)


@in_virtual_time
async def test_a_place_that_no_clock_gave_does_not_carry_the_order_of_events_with_it() -> None:
    world, (instance,) = await IngestHarness.begin()
    await world.command(wait("absurd", since_s=1e20), wait("later", since_s=60.0))
    await world.publish({"n": 1})
    await settled(instance)
    (event,) = world.database.events.values()
    assert event.seq <= (EPOCH_S + limits.CLOCK_AHEAD_MAX_S + 10) * 1_000_000


@pytest.mark.parametrize("since_s", [1e308, -1e308, 0.0])
def test_a_wait_that_listens_from_any_time_harms_no_other(since_s: float) -> None:
    _listen_from(since_s)


@in_virtual_time
async def _listen_from(since_s: float) -> None:
    world, (instance,) = await IngestHarness.begin()
    odd, good = wait("odd"), wait("good")
    on = json.loads(encode([odd]))
    on[0]["condition"]["since_s"] = since_s
    await world.user.publish([Outgoing("", INGEST, json.dumps(on).encode()), Outgoing("", INGEST, encode([good]))])
    await world.publish({"n": 1}, message_id="m")
    await world.publish({"n": 1}, message_id="m")
    await settled(instance)
    assert world.woken.keys() == {"odd.t", "good.t"}
    assert world.dead == []
