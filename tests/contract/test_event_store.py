"""The contract of `EventStore`, for every adapter."""

from __future__ import annotations

import dataclasses

import pytest

from contract.records import AWKWARD
from sublet_platform.ports import EventStore, StoredEvent, StoredSubscription, TriggerRecord
from sublet_protocol.messages import Subscribe
from sublet_protocol.specs import EventCondition, EventFilter

BASE = 1_700_000_000_000_000
"""Microseconds since 1970."""


def an_event(number: int, key: str = "order.paid", **fields: object) -> StoredEvent:
    event = StoredEvent(
        id=f"event-{number}",
        seq=BASE + number,
        key=key,
        payload='{"order": 42}',
        scope=None,
        metadata={},
        priority=None,
        seen_at=BASE / 1e6 + number,
    )
    return dataclasses.replace(event, **fields)  # type: ignore[arg-type]


def a_subscription(wait_id: str, match_key: str) -> StoredSubscription:
    condition = EventCondition("c", "order.paid", "input.order == 42", "acme", 12.5)
    return StoredSubscription(wait_id, match_key, Subscribe(wait_id, "r.t", "1", condition, BASE))


# --- events -----------------------------------------------------------------------------------------------


async def test_an_event_is_loaded_as_it_was_stored(event_store: EventStore) -> None:
    event = an_event(1, scope="acme", metadata=AWKWARD, priority=2, payload='{"a": [1, "ü"]}')
    assert await event_store.insert_events([event]) == set()
    assert await event_store.get_events(["event-1", "missing"]) == [event]
    assert await event_store.get_events([]) == []


async def test_events_that_exist_are_reported_and_not_changed(event_store: EventStore) -> None:
    await event_store.insert_events([an_event(1), an_event(2)])
    again = [an_event(1, payload='"changed"'), an_event(3), an_event(2, payload='"changed"')]
    assert await event_store.insert_events(again) == {"event-1", "event-2"}
    events = await event_store.get_events(["event-1", "event-2", "event-3"])
    assert {event.payload for event in events} == {'{"order": 42}'}
    assert len(events) == 3


async def test_the_last_seq_is_the_highest_or_zero(event_store: EventStore) -> None:
    assert await event_store.last_seq() == 0
    await event_store.insert_events([an_event(2), an_event(5), an_event(3)])
    assert await event_store.last_seq() == BASE + 5


async def test_the_last_seq_is_the_advanced_one_if_that_is_higher(event_store: EventStore) -> None:
    await event_store.advance_past(BASE + 3)
    await event_store.insert_events([an_event(2)])
    assert await event_store.last_seq() == BASE + 3
    await event_store.advance_past(BASE + 1)
    assert await event_store.last_seq() == BASE + 3
    await event_store.insert_events([an_event(5)])
    assert await event_store.last_seq() == BASE + 5


async def test_the_look_back_finds_the_events_of_each_key_after_its_position(event_store: EventStore) -> None:
    await event_store.insert_events(
        [an_event(5, "b"), an_event(1, "a"), an_event(2, "b"), an_event(3, "a"), an_event(4, "c")]
    )
    found = await event_store.events_after({"a": BASE + 1, "b": 0}, 10)
    assert [event.id for event in found] == ["event-2", "event-3", "event-5"]
    assert [event.id for event in await event_store.events_after({"a": 0, "b": 0}, 2)] == ["event-1", "event-2"]
    assert await event_store.events_after({}, 10) == []


async def test_events_are_listed_newest_first_by_key_and_time(event_store: EventStore) -> None:
    await event_store.insert_events([an_event(1, "a"), an_event(2, "b"), an_event(3, "a")])
    assert [event.id for event in await event_store.list_events(None, None, 2)] == ["event-3", "event-2"]
    assert [event.id for event in await event_store.list_events("a", None, 10)] == ["event-3", "event-1"]
    assert [event.id for event in await event_store.list_events("a", an_event(2).seen_at, 10)] == ["event-3"]


# --- subscriptions ----------------------------------------------------------------------------------------


async def test_subscriptions_are_found_by_their_match_keys(event_store: EventStore) -> None:
    waits = [a_subscription("w1", "paid"), a_subscription("w2", "paid"), a_subscription("w3", "sent")]
    await event_store.change_subscriptions([*waits, a_subscription("w4", "lost")], [])
    found = await event_store.find_subscriptions(["paid", "sent", "nothing"])
    assert sorted(found, key=lambda each: each.id) == waits
    assert await event_store.find_subscriptions([]) == []


async def test_subscribing_again_changes_the_match_key(event_store: EventStore) -> None:
    await event_store.change_subscriptions([a_subscription("w1", "old")], [])
    await event_store.change_subscriptions([a_subscription("w1", "new")], [])
    assert await event_store.find_subscriptions(["old"]) == []
    assert await event_store.find_subscriptions(["new"]) == [a_subscription("w1", "new")]


async def test_subscriptions_are_deleted_and_missing_ones_are_ignored(event_store: EventStore) -> None:
    await event_store.change_subscriptions([a_subscription("w1", "k"), a_subscription("w2", "k")], [])
    await event_store.change_subscriptions([a_subscription("w3", "k")], ["w1", "missing"])
    found = await event_store.find_subscriptions(["k"])
    assert sorted(each.id for each in found) == ["w2", "w3"]
    await event_store.change_subscriptions([], [])


async def test_all_subscriptions_can_be_read_page_by_page(event_store: EventStore) -> None:
    waits = [a_subscription(f"w{number}", "k") for number in range(5)]
    await event_store.change_subscriptions(reversed(waits), [])  # type: ignore[arg-type]
    assert await event_store.subscriptions_after("", 3) == waits[:3]
    assert await event_store.subscriptions_after("w2", 3) == waits[3:]
    assert await event_store.subscriptions_after("w4", 3) == []


# --- field sets and triggers ----------------------------------------------------------------------------------


async def test_field_sets_are_added_and_each_is_stored_once(event_store: EventStore) -> None:
    await event_store.save_field_sets({"a": [("order",), ("order", "user.id")], "b": [()]})
    await event_store.save_field_sets({"a": [("order",), ("user.id",)], "c": []})
    field_sets = await event_store.load_field_sets(["a", "b", "missing"])
    assert sorted(field_sets) == ["a", "b"]
    assert sorted(field_sets["a"]) == [("order",), ("order", "user.id"), ("user.id",)]
    assert list(field_sets["b"]) == [()]
    assert await event_store.load_field_sets([]) == {}


@pytest.mark.parametrize("key", ["with.dot", "$dollar", "ünïcode", "a" * 200])
async def test_any_event_key_can_have_field_sets(event_store: EventStore, key: str) -> None:
    await event_store.save_field_sets({key: [("x",)]})
    assert dict(await event_store.load_field_sets([key])) == {key: [("x",)]}


async def test_triggers_are_replaced_by_newer_ones_only(event_store: EventStore) -> None:
    filters = (EventFilter("input.a == payload.b", "acme", AWKWARD),)
    first = TriggerRecord("w", ("order.*",), filters)
    later = TriggerRecord("w", ("order.paid",), ())
    other = TriggerRecord("v", ("x",), ())
    await event_store.save_trigger(first, 10.0)
    await event_store.save_trigger(other, 10.0)
    assert await event_store.load_triggers() == [other, first]
    await event_store.save_trigger(later, 20.0)
    await event_store.save_trigger(first, 15.0)
    assert await event_store.load_triggers() == [other, later]
    await event_store.save_trigger(first, 20.0)
    assert await event_store.load_triggers() == [other, first]
