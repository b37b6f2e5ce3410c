"""The event-ingest service on ports in memory, in virtual time."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence

import pytest

from sublet_event_ingest import ingest as ingest_module
from sublet_platform.memory import MemoryEventStore
from sublet_platform.ports import Outgoing, StoreUnavailable
from sublet_protocol.messages import (
    RegisterTriggers,
    Subscribe,
    Unsubscribe,
    encode,
)
from sublet_protocol.specs import EventCondition, EventFilter
from sublet_protocol.topology import EVENTS, INGEST
from support.ingest_harness import IngestHarness, Instance, settled, wait
from support.virtual_time import in_virtual_time

# --- waits ----------------------------------------------------------------------------------------------------


@in_virtual_time
async def test_an_event_satisfies_a_wait_registered_before_it() -> None:
    harness, [instance] = await IngestHarness.begin()
    await harness.command(wait("a"), wait("b", key="other"))
    await asyncio.sleep(1)
    await harness.publish({"n": 1})
    await settled(instance)
    assert harness.woken == {"a.t": {"n": 1}}
    assert list(harness.database.subscriptions) == ["wait-b"]


@in_virtual_time
async def test_a_look_back_finds_the_earliest_event_before_the_wait() -> None:
    harness, [instance] = await IngestHarness.begin()
    for n in range(3):
        await harness.publish({"n": n})
        await asyncio.sleep(1)
    await harness.command(
        wait("all"), wait("later", since_s=0.5), wait("none", since_s=100), wait("two", "input.n == 2")
    )
    await settled(instance)
    assert harness.woken == {"all.t": {"n": 0}, "later.t": {"n": 1}, "two.t": {"n": 2}}
    assert list(harness.database.subscriptions) == ["wait-none"]


@in_virtual_time
async def test_a_wait_looks_back_over_any_number_of_events(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ingest_module, "LOOK_BACK_PAGE", 3)
    harness, [instance] = await IngestHarness.begin()
    for n in range(20):
        await harness.publish({"n": n}, key="paid" if n % 2 else "sent")
    await asyncio.sleep(1)
    await harness.command(
        wait("a", "input.n == 19"), wait("b", "input.n >= 10", key="sent"), wait("c", "input.n == 99")
    )
    await settled(instance)
    assert harness.woken == {"a.t": {"n": 19}, "b.t": {"n": 10}}


@in_virtual_time
async def test_events_and_waits_of_one_batch_match_in_either_order() -> None:
    harness, [instance] = await IngestHarness.begin()
    await harness.publish_together(
        Outgoing("", INGEST, encode([wait("before")])),
        Outgoing(EVENTS, "paid", b'{"n":1}'),
        Outgoing("", INGEST, encode([wait("after")])),
        Outgoing(EVENTS, "paid", b'{"n":2}'),
    )
    await settled(instance)
    assert harness.woken == {"before.t": {"n": 1}, "after.t": {"n": 1}}
    assert len(harness.matched) == 2


@in_virtual_time
async def test_one_event_satisfies_all_waits_and_a_second_one_none() -> None:
    harness, [instance] = await IngestHarness.begin()
    await harness.command(*(wait(str(n)) for n in range(50)))
    await harness.publish({"n": 1})
    await harness.publish({"n": 2})
    await settled(instance)
    assert len(harness.matched) == 50
    assert all(payload == {"n": 1} for payload in harness.woken.values())
    assert harness.database.subscriptions == {}


@in_virtual_time
async def test_a_large_event_for_many_waits_is_published_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ingest_module, "PUBLISH_MAX_BYTES", 1_000_000)
    harness, [instance] = await IngestHarness.begin()
    sizes: list[int] = []
    publish = instance.broker.publish

    async def watch(messages: Sequence[Outgoing]) -> None:
        sizes.append(sum(len(message.body) for message in messages))
        await publish(messages)

    monkeypatch.setattr(instance.broker, "publish", watch)
    await harness.command(*(wait(str(n)) for n in range(100)))
    await harness.publish({"text": "x" * 200_000})
    await settled(instance)
    assert len(harness.matched) == 100
    assert len(sizes) > 10
    assert max(sizes) < 2_000_000
    assert harness.database.subscriptions == {}


@in_virtual_time
async def test_a_wait_gets_events_of_its_scope_only_and_without_scope_all() -> None:
    harness, [instance] = await IngestHarness.begin()
    await harness.command(wait("any"), wait("s", scope="s"), wait("t", scope="t"))
    await harness.publish({"n": 1}, scope="t")
    await harness.publish({"n": 2})
    await settled(instance)
    assert harness.woken == {"any.t": {"n": 1}, "t.t": {"n": 1}}


@in_virtual_time
async def test_a_wait_with_equality_terms_is_found_by_its_values() -> None:
    harness, [instance] = await IngestHarness.begin()
    await harness.command(*(wait(str(n), f"input.order_id == {n} && input.ok") for n in range(100)))
    await asyncio.sleep(1)
    looked_at: list[int] = []
    find = MemoryEventStore.find_subscriptions

    async def watch(self: MemoryEventStore, keys: Sequence[str]):  # type: ignore[no-untyped-def]
        found = await find(self, keys)
        looked_at.append(len(found))
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MemoryEventStore, "find_subscriptions", watch)
        await harness.publish({"order_id": 42, "ok": True})
        await asyncio.sleep(1)
    assert harness.woken == {"42.t": {"order_id": 42, "ok": True}}
    assert looked_at == [1]
    await settled(instance)


@in_virtual_time
async def test_an_unsubscribed_wait_gets_no_event() -> None:
    harness, [instance] = await IngestHarness.begin()
    await harness.command(wait("a"), wait("b"), Unsubscribe(id="wait-b"))
    await asyncio.sleep(1)
    await harness.command(Unsubscribe(id="wait-a"))
    await harness.publish()
    await settled(instance)
    assert harness.matched == []
    assert harness.database.subscriptions == {}


@in_virtual_time
async def test_an_invalid_expression_matches_nothing_and_does_not_fail_the_batch() -> None:
    harness, [instance] = await IngestHarness.begin()
    await harness.command(
        wait("bad", "input.n ==="), wait("failing", "input.missing > 1"), wait("good", "input.n == 1")
    )
    await harness.publish({"n": 1})
    await settled(instance)
    assert harness.woken == {"good.t": {"n": 1}}
    assert instance.value("sublet_expression_failures_total") == 2


@in_virtual_time
async def test_a_wait_gets_the_events_after_it_although_clocks_differ() -> None:
    harness, [instance] = await IngestHarness.begin(skew_s=-3_600.0)
    await harness.publish_together(Outgoing("", INGEST, encode([wait("a")])), Outgoing(EVENTS, "paid", b'{"n":1}'))
    await settled(instance)
    await harness.command(wait("b", since_s=5.0))
    again = Instance(harness, skew_s=-7_200.0)
    await again.service.start()
    await asyncio.sleep(1)
    await harness.publish({"n": 2})
    await settled(again)
    assert harness.woken == {"a.t": {"n": 1}, "b.t": {"n": 2}}


@in_virtual_time
async def test_a_late_event_of_a_replaced_instance_does_not_satisfy_a_wait_with_a_later_position() -> None:
    harness, [zombie] = await IngestHarness.begin()
    thawed = asyncio.Event()

    async def freeze(operation: str) -> None:
        if operation == "find_subscriptions":
            harness.database.before = _answers
            await thawed.wait()

    harness.database.before = freeze
    await harness.publish({"n": 1}, message_id="m")
    await asyncio.sleep(1)
    successor = Instance(harness)
    await successor.service.start()
    zombie.broker.kill_connection(down_s=5.0)
    await asyncio.sleep(9)
    await harness.command(wait("later", since_s=5.0))
    await asyncio.sleep(1)
    thawed.set()
    await asyncio.sleep(5)
    assert harness.woken == {}
    await harness.publish({"n": 2})
    await settled(zombie, successor)
    assert harness.woken == {"later.t": {"n": 2}}


async def _answers(operation: str) -> None:
    """The database answers at once."""


@in_virtual_time
async def test_consecutive_waits_from_the_last_position_neither_miss_nor_repeat_events() -> None:
    harness, [instance] = await IngestHarness.begin()
    for n in range(5):
        await harness.publish({"n": n})
    seen = []
    position = 0
    for turn in range(5):
        on = EventCondition(key="c", event_key="paid")
        await harness.command(Subscribe(f"w{turn}", "a.t", str(turn), on, position))
        await asyncio.sleep(1)
        seen.append(json.loads(bytes(harness.matched[-1].payload))["n"])
        position = harness.matched[-1].seq
    await settled(instance)
    assert seen == [0, 1, 2, 3, 4]


# --- triggers -------------------------------------------------------------------------------------------------


@in_virtual_time
async def test_an_event_starts_the_runs_that_it_triggers() -> None:
    harness, [instance] = await IngestHarness.begin()
    await harness.command(
        RegisterTriggers("exact", ("paid",)),
        RegisterTriggers("pattern", ("p*",)),
        RegisterTriggers("other", ("sent",)),
        RegisterTriggers("filtered", ("paid",), (EventFilter("input.n > payload.least", "s", {"least": 1}),)),
    )
    await harness.publish({"n": 1}, message_id="m1", scope="s", tenant="x", priority=3)
    await harness.publish({"n": 2}, scope="s")
    await harness.publish({"n": 3})
    await settled(instance)
    assert sorted((run.workflow, bytes(run.input)) for run in harness.runs) == [
        ("exact", b'{"n": 1}'),
        ("exact", b'{"n": 2}'),
        ("exact", b'{"n": 3}'),
        ("filtered", b'{"n": 2}'),
        ("pattern", b'{"n": 1}'),
        ("pattern", b'{"n": 2}'),
        ("pattern", b'{"n": 3}'),
    ]
    first = next(run for run in harness.runs if run.workflow == "exact")
    assert (first.metadata, first.priority) == ({"tenant": "x"}, 3)
    assert first.trigger is not None
    assert first.trigger.event_id == "paid:m1"


@in_virtual_time
async def test_an_event_both_satisfies_a_wait_and_starts_a_run() -> None:
    harness, [instance] = await IngestHarness.begin()
    await harness.command(RegisterTriggers("w", ("paid",)), wait("a"))
    await harness.publish({"n": 1})
    await settled(instance)
    assert harness.woken == {"a.t": {"n": 1}}
    assert len(harness.runs) == 1


@in_virtual_time
async def test_only_newer_triggers_replace_the_registered_ones() -> None:
    harness, [instance] = await IngestHarness.begin()
    await harness.command(RegisterTriggers("w", ("paid",), at=2.0))
    await asyncio.sleep(1)
    await harness.command(RegisterTriggers("w", ("sent",), at=1.0))
    await asyncio.sleep(1)
    await harness.publish({"n": 1})
    await asyncio.sleep(1)
    await harness.command(RegisterTriggers("w", (), at=3.0))
    await asyncio.sleep(1)
    await harness.publish({"n": 2})
    await settled(instance)
    assert [bytes(run.input) for run in harness.runs] == [b'{"n": 1}']


@in_virtual_time
async def test_triggers_are_loaded_after_a_restart() -> None:
    harness, [instance] = await IngestHarness.begin()
    await harness.command(RegisterTriggers("w", ("paid",)))
    await settled(instance)
    again = Instance(harness)
    await again.service.start()
    await harness.publish()
    await settled(again)
    assert len(harness.runs) == 1


# --- repeats, refusals and faults -------------------------------------------------------------------


@in_virtual_time
async def test_an_event_published_twice_is_one_event() -> None:
    harness, [instance] = await IngestHarness.begin()
    await harness.command(RegisterTriggers("w", ("paid",)))
    await harness.publish({"n": 1}, message_id="m")
    await harness.publish({"n": 1}, message_id="m")
    await asyncio.sleep(1)
    await harness.publish({"n": 1}, message_id="m")
    await harness.publish({"n": 9}, message_id="m", key="sent")
    await settled(instance)
    assert len(harness.database.events) == 2
    assert len({run.run_id for run in harness.runs}) == 1
    assert instance.value("sublet_events_total", outcome="stored") == 2


@in_virtual_time
async def test_a_repeated_event_does_not_satisfy_a_wait_that_began_after_the_first() -> None:
    harness, [instance] = await IngestHarness.begin()
    await harness.publish({"n": 1}, message_id="m")
    await asyncio.sleep(1)
    await harness.command(wait("a", since_s=0.5))
    await asyncio.sleep(1)
    await harness.publish({"n": 1}, message_id="m")
    await settled(instance)
    assert harness.matched == []


@in_virtual_time
async def test_invalid_messages_are_dead_lettered_with_the_reason() -> None:
    harness, [instance] = await IngestHarness.begin()
    await harness.command(wait("a"))
    await harness.user.publish(
        [
            Outgoing(EVENTS, "paid", b"no json"),
            Outgoing(EVENTS, "paid", b"[1]", message_id="m"),
            Outgoing(EVENTS, "paid", b"{}", headers={"priority": 9}),
            Outgoing("", INGEST, b'[{"t":"Nonsense"}]'),
            Outgoing(EVENTS, "paid", b'{"n":1}'),
        ]
    )
    await settled(instance)
    assert harness.woken == {"a.t": {"n": 1}}
    assert len(harness.dead) == 4
    reasons = [str(letter.headers["x-sublet-reason"]) for letter in harness.dead]
    assert [reason.partition(":")[0] for reason in reasons] == ["not an event"] * 3 + ["not a message for event-ingest"]
    assert instance.value("sublet_events_total", outcome="refused") == 4


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize(
    "operation",
    ["insert_events", "find_subscriptions", "change_subscriptions", "save_field_sets", "events_after", "load_triggers"],
)
@in_virtual_time
async def test_a_failed_store_operation_neither_loses_nor_duplicates_events(operation: str, moment: str) -> None:
    harness, [instance] = await IngestHarness.begin()
    await harness.command(wait("early", "input.n == 1"))
    await asyncio.sleep(1)
    failures = [operation]

    async def fail_once(called: str) -> None:
        if called in failures:
            failures.remove(called)
            raise StoreUnavailable("no primary")

    setattr(harness.database, moment, fail_once)
    await harness.user.publish(
        [
            Outgoing("", INGEST, encode([RegisterTriggers("w", ("paid",)), wait("late", "input.m == 2", since_s=-10)])),
            Outgoing(EVENTS, "paid", b'{"n":1,"m":2}'),
        ]
    )
    await settled(instance, seconds=30)
    assert failures == []
    assert set(harness.woken) == {"early.t", "late.t"}
    assert len(harness.database.events) == 1
    assert len({run.run_id for run in harness.runs}) == 1
    assert harness.database.subscriptions == {}


@in_virtual_time
async def test_a_standby_takes_over_when_the_connection_of_the_active_instance_is_cut() -> None:
    harness, [first, second] = await IngestHarness.begin(instances=2)
    await harness.command(wait("a", "input.n == 1"), RegisterTriggers("w", ("paid",)))
    await asyncio.sleep(1)

    async def slow(operation: str) -> None:
        await asyncio.sleep(1.0)

    harness.database.before = slow
    await harness.publish({"n": 1}, message_id="m")
    await asyncio.sleep(1.5)
    first.broker.kill_connection(down_s=60.0)
    await harness.command(wait("b", "input.n == 1 && input.n < 2", since_s=-10))
    await asyncio.sleep(30)
    assert set(harness.woken) == {"a.t", "b.t"}
    assert len(harness.database.events) == 1
    assert len({run.run_id for run in harness.runs}) == 1
    harness.database.before = _at_once
    await settled(first, second)


async def _at_once(operation: str) -> None:
    """The database answers at once."""


@in_virtual_time
async def test_a_wait_with_a_field_set_that_is_not_cached_yet_is_found() -> None:
    harness, [first] = await IngestHarness.begin()
    await harness.publish({"n": 0})
    await asyncio.sleep(1)
    store = MemoryEventStore(harness.database)
    other = Instance(harness)
    await harness.command(wait("a", "input.n == 1"))
    await asyncio.sleep(1)
    [subscription] = harness.database.subscriptions.values()
    field_sets = dict(harness.database.field_sets)
    await first.stop()
    harness.database.subscriptions.clear()
    harness.database.field_sets.clear()
    await other.service.start()
    await harness.publish({"n": 0})
    await asyncio.sleep(1)
    await store.save_field_sets(field_sets)
    await store.change_subscriptions([subscription], [])
    await harness.publish({"n": 1})
    await settled(other)
    assert harness.woken == {"a.t": {"n": 1}}


@in_virtual_time
async def test_events_without_message_id_are_not_duplicated_when_a_batch_is_retried() -> None:
    harness, [instance] = await IngestHarness.begin()
    failures = ["find_subscriptions"]

    async def break_once(called: str) -> None:
        if called in failures:
            failures.remove(called)
            raise RuntimeError("a bug")

    harness.database.before = break_once
    await harness.publish_together(*(Outgoing(EVENTS, "paid", b'{"n":%d}' % n) for n in range(5)))
    await settled(instance)
    assert failures == []
    assert sorted(event.payload for event in harness.database.events.values()) == [f'{{"n":{n}}}' for n in range(5)]
    assert harness.dead == []
