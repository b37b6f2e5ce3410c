"""Event-ingest on ports in memory, in virtual time."""

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
async def test_an_event_wakes_the_wait_that_was_there_before_it() -> None:
    world, [instance] = await IngestHarness.begin()
    await world.command(wait("a"), wait("b", key="other"))
    await asyncio.sleep(1)
    await world.publish({"n": 1})
    await settled(instance)
    assert world.woken == {"a.t": {"n": 1}}
    assert list(world.database.subscriptions) == ["wait-b"]


@in_virtual_time
async def test_an_event_that_came_before_the_wait_is_found_the_earliest_first() -> None:
    world, [instance] = await IngestHarness.begin()
    for n in range(3):
        await world.publish({"n": n})
        await asyncio.sleep(1)
    await world.command(wait("all"), wait("later", since_s=0.5), wait("none", since_s=100), wait("two", "input.n == 2"))
    await settled(instance)
    assert world.woken == {"all.t": {"n": 0}, "later.t": {"n": 1}, "two.t": {"n": 2}}
    assert list(world.database.subscriptions) == ["wait-none"]


@in_virtual_time
async def test_a_wait_looks_back_over_any_number_of_events(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ingest_module, "LOOK_BACK_PAGE", 3)
    world, [instance] = await IngestHarness.begin()
    for n in range(20):
        await world.publish({"n": n}, key="paid" if n % 2 else "sent")
    await asyncio.sleep(1)
    await world.command(wait("a", "input.n == 19"), wait("b", "input.n >= 10", key="sent"), wait("c", "input.n == 99"))
    await settled(instance)
    assert world.woken == {"a.t": {"n": 19}, "b.t": {"n": 10}}


@in_virtual_time
async def test_events_and_waits_of_one_batch_find_each_other_whichever_comes_first() -> None:
    world, [instance] = await IngestHarness.begin()
    await world.publish_together(
        Outgoing("", INGEST, encode([wait("before")])),
        Outgoing(EVENTS, "paid", b'{"n":1}'),
        Outgoing("", INGEST, encode([wait("after")])),
        Outgoing(EVENTS, "paid", b'{"n":2}'),
    )
    await settled(instance)
    assert world.woken == {"before.t": {"n": 1}, "after.t": {"n": 1}}
    assert len(world.matched) == 2


@in_virtual_time
async def test_one_event_wakes_all_that_wait_and_a_second_one_nobody() -> None:
    world, [instance] = await IngestHarness.begin()
    await world.command(*(wait(str(n)) for n in range(50)))
    await world.publish({"n": 1})
    await world.publish({"n": 2})
    await settled(instance)
    assert len(world.matched) == 50
    assert all(payload == {"n": 1} for payload in world.woken.values())
    assert world.database.subscriptions == {}


@in_virtual_time
async def test_a_large_event_for_many_waits_goes_out_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ingest_module, "PUBLISH_MAX_BYTES", 1_000_000)
    world, [instance] = await IngestHarness.begin()
    sizes: list[int] = []
    publish = instance.broker.publish

    async def watch(messages: Sequence[Outgoing]) -> None:
        sizes.append(sum(len(message.body) for message in messages))
        await publish(messages)

    monkeypatch.setattr(instance.broker, "publish", watch)
    await world.command(*(wait(str(n)) for n in range(100)))
    await world.publish({"text": "x" * 200_000})
    await settled(instance)
    assert len(world.matched) == 100
    assert len(sizes) > 10
    assert max(sizes) < 2_000_000
    assert world.database.subscriptions == {}


@in_virtual_time
async def test_scopes_are_kept_apart_and_a_wait_without_scope_takes_all() -> None:
    world, [instance] = await IngestHarness.begin()
    await world.command(wait("any"), wait("s", scope="s"), wait("t", scope="t"))
    await world.publish({"n": 1}, scope="t")
    await world.publish({"n": 2})
    await settled(instance)
    assert world.woken == {"any.t": {"n": 1}, "t.t": {"n": 1}}


@in_virtual_time
async def test_a_wait_with_equality_terms_is_found_by_its_values() -> None:
    world, [instance] = await IngestHarness.begin()
    await world.command(*(wait(str(n), f"input.order_id == {n} && input.ok") for n in range(100)))
    await asyncio.sleep(1)
    looked_at: list[int] = []
    find = MemoryEventStore.find_subscriptions

    async def watch(self: MemoryEventStore, keys: Sequence[str]):  # type: ignore[no-untyped-def]
        found = await find(self, keys)
        looked_at.append(len(found))
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MemoryEventStore, "find_subscriptions", watch)
        await world.publish({"order_id": 42, "ok": True})
        await asyncio.sleep(1)
    assert world.woken == {"42.t": {"order_id": 42, "ok": True}}
    assert looked_at == [1]
    await settled(instance)


@in_virtual_time
async def test_a_withdrawn_wait_is_not_woken() -> None:
    world, [instance] = await IngestHarness.begin()
    await world.command(wait("a"), wait("b"), Unsubscribe(id="wait-b"))
    await asyncio.sleep(1)
    await world.command(Unsubscribe(id="wait-a"))
    await world.publish()
    await settled(instance)
    assert world.matched == []
    assert world.database.subscriptions == {}


@in_virtual_time
async def test_a_bad_expression_neither_breaks_the_batch_nor_wakes() -> None:
    world, [instance] = await IngestHarness.begin()
    await world.command(wait("bad", "input.n ==="), wait("failing", "input.missing > 1"), wait("good", "input.n == 1"))
    await world.publish({"n": 1})
    await settled(instance)
    assert world.woken == {"good.t": {"n": 1}}
    assert instance.value("sublet_expression_failures_total") == 2


@in_virtual_time
async def test_clocks_that_disagree_lose_no_event_that_comes_after_its_wait() -> None:
    world, [instance] = await IngestHarness.begin(skew_s=-3_600.0)
    await world.publish_together(Outgoing("", INGEST, encode([wait("a")])), Outgoing(EVENTS, "paid", b'{"n":1}'))
    await settled(instance)
    await world.command(wait("b", since_s=5.0))
    again = Instance(world, skew_s=-7_200.0)
    await again.shell.start()
    await asyncio.sleep(1)
    await world.publish({"n": 2})
    await settled(again)
    assert world.woken == {"a.t": {"n": 1}, "b.t": {"n": 2}}


@in_virtual_time
async def test_an_event_in_hand_of_who_was_replaced_wakes_no_wait_that_listens_from_later() -> None:
    world, [zombie] = await IngestHarness.begin()
    thawed = asyncio.Event()

    async def freeze(operation: str) -> None:
        if operation == "find_subscriptions":
            world.database.before = _answers
            await thawed.wait()

    world.database.before = freeze
    await world.publish({"n": 1}, message_id="m")
    await asyncio.sleep(1)
    successor = Instance(world)
    await successor.shell.start()
    zombie.broker.kill_connection(down_s=5.0)
    await asyncio.sleep(9)
    await world.command(wait("later", since_s=5.0))
    await asyncio.sleep(1)
    thawed.set()
    await asyncio.sleep(5)
    assert world.woken == {}
    await world.publish({"n": 2})
    await settled(zombie, successor)
    assert world.woken == {"later.t": {"n": 2}}


async def _answers(operation: str) -> None:
    """At once."""


@in_virtual_time
async def test_consecutive_waits_that_go_on_where_the_last_event_was_miss_and_repeat_nothing() -> None:
    world, [instance] = await IngestHarness.begin()
    for n in range(5):
        await world.publish({"n": n})
    seen = []
    position = 0
    for turn in range(5):
        on = EventCondition(key="c", event_key="paid")
        await world.command(Subscribe(f"w{turn}", "a.t", str(turn), on, position))
        await asyncio.sleep(1)
        seen.append(json.loads(bytes(world.matched[-1].payload))["n"])
        position = world.matched[-1].seq
    await settled(instance)
    assert seen == [0, 1, 2, 3, 4]


# --- triggers -------------------------------------------------------------------------------------------------


@in_virtual_time
async def test_an_event_starts_the_runs_that_it_triggers() -> None:
    world, [instance] = await IngestHarness.begin()
    await world.command(
        RegisterTriggers("exact", ("paid",)),
        RegisterTriggers("pattern", ("p*",)),
        RegisterTriggers("other", ("sent",)),
        RegisterTriggers("filtered", ("paid",), (EventFilter("input.n > payload.least", "s", {"least": 1}),)),
    )
    await world.publish({"n": 1}, message_id="m1", scope="s", tenant="x", priority=3)
    await world.publish({"n": 2}, scope="s")
    await world.publish({"n": 3})
    await settled(instance)
    assert sorted((run.workflow, bytes(run.input)) for run in world.runs) == [
        ("exact", b'{"n": 1}'),
        ("exact", b'{"n": 2}'),
        ("exact", b'{"n": 3}'),
        ("filtered", b'{"n": 2}'),
        ("pattern", b'{"n": 1}'),
        ("pattern", b'{"n": 2}'),
        ("pattern", b'{"n": 3}'),
    ]
    first = next(run for run in world.runs if run.workflow == "exact")
    assert (first.metadata, first.priority) == ({"tenant": "x"}, 3)
    assert first.trigger is not None
    assert first.trigger.event_id == "paid:m1"


@in_virtual_time
async def test_an_event_both_wakes_a_wait_and_starts_a_run() -> None:
    world, [instance] = await IngestHarness.begin()
    await world.command(RegisterTriggers("w", ("paid",)), wait("a"))
    await world.publish({"n": 1})
    await settled(instance)
    assert world.woken == {"a.t": {"n": 1}}
    assert len(world.runs) == 1


@in_virtual_time
async def test_triggers_registered_later_replace_those_before_and_older_ones_do_not() -> None:
    world, [instance] = await IngestHarness.begin()
    await world.command(RegisterTriggers("w", ("paid",), at=2.0))
    await asyncio.sleep(1)
    await world.command(RegisterTriggers("w", ("sent",), at=1.0))
    await asyncio.sleep(1)
    await world.publish({"n": 1})
    await asyncio.sleep(1)
    await world.command(RegisterTriggers("w", (), at=3.0))
    await asyncio.sleep(1)
    await world.publish({"n": 2})
    await settled(instance)
    assert [bytes(run.input) for run in world.runs] == [b'{"n": 1}']


@in_virtual_time
async def test_triggers_are_known_after_a_restart() -> None:
    world, [instance] = await IngestHarness.begin()
    await world.command(RegisterTriggers("w", ("paid",)))
    await settled(instance)
    again = Instance(world)
    await again.shell.start()
    await world.publish()
    await settled(again)
    assert len(world.runs) == 1


# --- what is repeated, refused, interrupted -------------------------------------------------------------------


@in_virtual_time
async def test_an_event_published_twice_is_one_event() -> None:
    world, [instance] = await IngestHarness.begin()
    await world.command(RegisterTriggers("w", ("paid",)))
    await world.publish({"n": 1}, message_id="m")
    await world.publish({"n": 1}, message_id="m")
    await asyncio.sleep(1)
    await world.publish({"n": 1}, message_id="m")
    await world.publish({"n": 9}, message_id="m", key="sent")
    await settled(instance)
    assert len(world.database.events) == 2
    assert len({run.run_id for run in world.runs}) == 1
    assert instance.value("sublet_events_total", outcome="stored") == 2


@in_virtual_time
async def test_an_event_that_is_repeated_does_not_satisfy_a_wait_that_began_after_it() -> None:
    world, [instance] = await IngestHarness.begin()
    await world.publish({"n": 1}, message_id="m")
    await asyncio.sleep(1)
    await world.command(wait("a", since_s=0.5))
    await asyncio.sleep(1)
    await world.publish({"n": 1}, message_id="m")
    await settled(instance)
    assert world.matched == []


@in_virtual_time
async def test_messages_that_are_no_events_go_to_the_dead_letters_with_the_reason() -> None:
    world, [instance] = await IngestHarness.begin()
    await world.command(wait("a"))
    await world.user.publish(
        [
            Outgoing(EVENTS, "paid", b"no json"),
            Outgoing(EVENTS, "paid", b"[1]", message_id="m"),
            Outgoing(EVENTS, "paid", b"{}", headers={"priority": 9}),
            Outgoing("", INGEST, b'[{"t":"Nonsense"}]'),
            Outgoing(EVENTS, "paid", b'{"n":1}'),
        ]
    )
    await settled(instance)
    assert world.woken == {"a.t": {"n": 1}}
    assert len(world.dead) == 4
    reasons = [str(letter.headers["x-sublet-reason"]) for letter in world.dead]
    assert [reason.partition(":")[0] for reason in reasons] == ["not an event"] * 3 + ["not a message for event-ingest"]
    assert instance.value("sublet_events_total", outcome="refused") == 4


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize(
    "operation",
    ["insert_events", "find_subscriptions", "change_subscriptions", "save_field_sets", "events_after", "load_triggers"],
)
@in_virtual_time
async def test_a_store_that_fails_at_any_step_loses_and_doubles_nothing(operation: str, moment: str) -> None:
    world, [instance] = await IngestHarness.begin()
    await world.command(wait("early", "input.n == 1"))
    await asyncio.sleep(1)
    failures = [operation]

    async def fail_once(called: str) -> None:
        if called in failures:
            failures.remove(called)
            raise StoreUnavailable("away")

    setattr(world.database, moment, fail_once)
    await world.user.publish(
        [
            Outgoing("", INGEST, encode([RegisterTriggers("w", ("paid",)), wait("late", "input.m == 2", since_s=-10)])),
            Outgoing(EVENTS, "paid", b'{"n":1,"m":2}'),
        ]
    )
    await settled(instance, seconds=30)
    assert failures == []
    assert set(world.woken) == {"early.t", "late.t"}
    assert len(world.database.events) == 1
    assert len({run.run_id for run in world.runs}) == 1
    assert world.database.subscriptions == {}


@in_virtual_time
async def test_another_instance_goes_on_where_the_first_was_cut_off() -> None:
    world, [first, second] = await IngestHarness.begin(instances=2)
    await world.command(wait("a", "input.n == 1"), RegisterTriggers("w", ("paid",)))
    await asyncio.sleep(1)

    async def slow(operation: str) -> None:
        await asyncio.sleep(1.0)

    world.database.before = slow
    await world.publish({"n": 1}, message_id="m")
    await asyncio.sleep(1.5)
    first.broker.kill_connection(down_s=60.0)
    await world.command(wait("b", "input.n == 1 && input.n < 2", since_s=-10))
    await asyncio.sleep(30)
    assert set(world.woken) == {"a.t", "b.t"}
    assert len(world.database.events) == 1
    assert len({run.run_id for run in world.runs}) == 1
    world.database.before = _at_once
    await settled(first, second)


async def _at_once(operation: str) -> None:
    """The database answers at once."""


@in_virtual_time
async def test_a_wait_with_a_new_shape_is_seen_by_an_instance_that_does_not_know_it_yet() -> None:
    world, [first] = await IngestHarness.begin()
    await world.publish({"n": 0})
    await asyncio.sleep(1)
    store = MemoryEventStore(world.database)
    other = Instance(world)
    await world.command(wait("a", "input.n == 1"))
    await asyncio.sleep(1)
    [subscription] = world.database.subscriptions.values()
    field_sets = dict(world.database.field_sets)
    await first.stop()
    world.database.subscriptions.clear()
    world.database.field_sets.clear()
    await other.shell.start()
    await world.publish({"n": 0})
    await asyncio.sleep(1)
    await store.save_field_sets(field_sets)
    await store.change_subscriptions([subscription], [])
    await world.publish({"n": 1})
    await settled(other)
    assert world.woken == {"a.t": {"n": 1}}


@in_virtual_time
async def test_events_without_message_id_are_not_doubled_by_a_batch_that_is_handled_again() -> None:
    world, [instance] = await IngestHarness.begin()
    failures = ["find_subscriptions"]

    async def break_once(called: str) -> None:
        if called in failures:
            failures.remove(called)
            raise RuntimeError("a bug")

    world.database.before = break_once
    await world.publish_together(*(Outgoing(EVENTS, "paid", b'{"n":%d}' % n) for n in range(5)))
    await settled(instance)
    assert failures == []
    assert sorted(event.payload for event in world.database.events.values()) == [f'{{"n":{n}}}' for n in range(5)]
    assert world.dead == []
