"""Event-ingest with hostile messages: their cost is bounded, and other messages are not affected."""

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
async def test_an_expression_that_is_too_expensive_is_not_evaluated_and_does_not_affect_other_waits() -> None:
    harness, (instance,) = await IngestHarness.begin()
    payload = {"a": list(range(3_000)), "s": "x" * 500_000, "n": 1}
    assert read_cost(DEAR).work(extent_of([payload])) > limits.EXPRESSION_WORK_MAX_BYTES
    await harness.command(*(wait(f"dear-{number}", DEAR) for number in range(50)))
    await harness.command(wait("cheap", "input.n == 1 && input.s != ''"), wait("indexed", "input.n == 1"))
    await harness.publish(payload)
    await settled(instance)
    assert harness.woken.keys() == {"cheap.t", "indexed.t"}
    assert instance.value("sublet_expression_failures_total") == 50


@in_virtual_time
async def test_an_event_that_is_too_large_is_cut_at_once_and_dead_lettered() -> None:
    harness, (instance,) = await IngestHarness.begin()
    size = 8 * limits.PAYLOAD_MAX_BYTES
    await harness.user.publish([Outgoing(EVENTS, "paid", b'{"x": "' + b"y" * size + b'"}', message_id="large")])
    await harness.publish({"n": 1})
    await settled(instance)
    (letter,) = harness.dead
    assert "at most 1,048,576 bytes" in str(letter.headers["x-sublet-reason"])
    assert (letter.message_id, letter.headers["x-sublet-routing-key"]) == ("large", "paid")
    assert len(letter.body) == limits.PAYLOAD_MAX_BYTES + 1, "it must be refused again after a requeue"
    assert [json.loads(event.payload) for event in harness.database.events.values()] == [{"n": 1}]


@in_virtual_time
async def test_the_bytes_of_events_in_memory_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    harness, (instance,) = await IngestHarness.begin()
    held: dict[int, int] = {}
    handle, ack = instance.service._batches.handle, instance.broker.ack

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
    monkeypatch.setattr(instance.service._batches, "handle", count)
    monkeypatch.setattr(instance.broker, "ack", settle)
    harness.database.before = _slow
    flood = limits.EVENT_PREFETCH * 3
    await harness.user.publish([Outgoing(EVENTS, "flood", b'{"x":"' + b"y" * 5_000 + b'"}') for _ in range(flood)])
    await settled(instance, seconds=600.0)
    assert len(peaks) == flood == len(harness.dead)
    assert max(peaks) <= limits.EVENT_PREFETCH * (limits.PAYLOAD_MAX_BYTES + 1)
    assert not held


async def _slow(operation: str) -> None:
    await asyncio.sleep(0.1)


@in_virtual_time
async def test_a_position_far_in_the_future_does_not_move_the_positions_of_events() -> None:
    harness, (instance,) = await IngestHarness.begin()
    await harness.command(wait("absurd", since_s=1e20), wait("later", since_s=60.0))
    await harness.publish({"n": 1})
    await settled(instance)
    (event,) = harness.database.events.values()
    assert event.seq <= (EPOCH_S + limits.CLOCK_AHEAD_MAX_S + 10) * 1_000_000


@pytest.mark.parametrize("since_s", [1e308, -1e308, 0.0])
def test_a_wait_with_any_position_does_not_affect_other_waits(since_s: float) -> None:
    _listen_from(since_s)


@in_virtual_time
async def _listen_from(since_s: float) -> None:
    harness, (instance,) = await IngestHarness.begin()
    odd, good = wait("odd"), wait("good")
    on = json.loads(encode([odd]))
    on[0]["condition"]["since_s"] = since_s
    await harness.user.publish([Outgoing("", INGEST, json.dumps(on).encode()), Outgoing("", INGEST, encode([good]))])
    await harness.publish({"n": 1}, message_id="m")
    await harness.publish({"n": 1}, message_id="m")
    await settled(instance)
    assert harness.woken.keys() == {"odd.t", "good.t"}
    assert harness.dead == []
