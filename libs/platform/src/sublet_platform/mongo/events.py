"""The store of event-ingest in MongoDB: ``events``, ``sequence``, ``subscriptions``, ``field_sets``, ``triggers``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import msgspec

from sublet_platform.mongo.client import Document, Index, Mongo
from sublet_platform.mongo.run_documents import json_text
from sublet_platform.ports import StoredEvent, StoredSubscription, TriggerRecord
from sublet_protocol import limits
from sublet_protocol.messages import Subscribe
from sublet_protocol.specs import EventFilter

_INDEXES = {
    "events": (
        Index([("key", 1), ("seq", 1)]),
        Index([("seq", -1)]),
        Index([("expire_at", 1)], expires=True),
    ),
    "subscriptions": (Index([("match_key", 1)]),),
}


class MongoEventStore:
    """See `ports.EventStore`."""

    def __init__(self, mongo: Mongo) -> None:
        self._mongo = mongo

    async def ensure_indexes(self) -> None:
        await self._mongo.ensure_indexes(_INDEXES)

    async def insert_events(self, events: Sequence[StoredEvent]) -> set[str]:
        written = await self._mongo.write("events", inserts=[_event_document(event) for event in events])
        return {events[index].id for index in written.duplicates}

    async def get_events(self, ids: Sequence[str]) -> list[StoredEvent]:
        if not ids:
            return []
        return [_event(each) for each in await self._mongo.find("events", {"_id": {"$in": list(ids)}})]

    async def last_seq(self) -> int:
        newest = await self._mongo.find_one("events", {}, sort=[("seq", -1)])
        passed = await self._mongo.find_one("sequence", {"_id": "events"})
        return max(newest["seq"] if newest else 0, passed["passed"] if passed else 0)

    async def advance_past(self, seq: int) -> None:
        await self._mongo.raise_to("sequence", "events", "passed", seq)

    async def events_after(self, after: Mapping[str, int], limit: int) -> list[StoredEvent]:
        if not after:
            return []
        where = {"$or": [{"key": key, "seq": {"$gt": seq}} for key, seq in after.items()]}
        return [_event(each) for each in await self._mongo.find("events", where, sort=[("seq", 1)], limit=limit)]

    async def change_subscriptions(self, upserts: Sequence[StoredSubscription], deletes: Sequence[str]) -> None:
        documents = [
            {"_id": each.id, "match_key": each.match_key, "subscribe": json_text(each.subscribe)} for each in upserts
        ]
        await self._mongo.replace("subscriptions", documents, deletes)

    async def find_subscriptions(self, match_keys: Sequence[str]) -> list[StoredSubscription]:
        if not match_keys:
            return []
        found = await self._mongo.find("subscriptions", {"match_key": {"$in": list(match_keys)}})
        return [_subscription(each) for each in found]

    async def subscriptions_after(self, subscription_id: str, limit: int) -> list[StoredSubscription]:
        where = {"_id": {"$gt": subscription_id}}
        found = await self._mongo.find("subscriptions", where, sort=[("_id", 1)], limit=limit)
        return [_subscription(each) for each in found]

    async def count_subscriptions(self) -> int:
        return await self._mongo.count("subscriptions")

    async def save_field_sets(self, field_sets: Mapping[str, Sequence[tuple[str, ...]]]) -> None:
        await self._mongo.add_to_sets(
            "field_sets", "paths", {key: [list(paths) for paths in added] for key, added in field_sets.items() if added}
        )

    async def load_field_sets(self, event_keys: Sequence[str]) -> Mapping[str, Sequence[tuple[str, ...]]]:
        if not event_keys:
            return {}
        documents = await self._mongo.find("field_sets", {"_id": {"$in": list(event_keys)}})
        return {each["_id"]: [tuple(paths) for paths in each["paths"]] for each in documents}

    async def save_trigger(self, trigger: TriggerRecord, at: float) -> None:
        document = {
            "_id": trigger.workflow,
            "on_events": list(trigger.on_events),
            "filters": json_text(trigger.filters),
            "at": at,
        }
        await self._mongo.replace_unless("triggers", document, {"at": {"$gt": at}})

    async def load_triggers(self) -> list[TriggerRecord]:
        return [
            TriggerRecord(
                each["_id"],
                tuple(each["on_events"]),
                msgspec.json.decode(each["filters"], type=tuple[EventFilter, ...]),
            )
            for each in await self._mongo.find("triggers", {}, sort=[("_id", 1)])
        ]

    async def list_events(self, key: str | None, since: float | None, limit: int) -> list[StoredEvent]:
        where: dict[str, Any] = {}
        if key is not None:
            where["key"] = key
        if since is not None:
            where["seen_at"] = {"$gte": since}
        return [_event(each) for each in await self._mongo.find("events", where, sort=[("seq", -1)], limit=limit)]


def _event_document(event: StoredEvent) -> Document:
    return {
        "_id": event.id,
        "seq": event.seq,
        "key": event.key,
        "payload": event.payload,
        "scope": event.scope,
        "metadata": json_text(event.metadata),
        "priority": event.priority,
        "seen_at": event.seen_at,
        "expire_at": datetime.fromtimestamp(event.seen_at + limits.EVENT_RETENTION_S, UTC),
    }


def _subscription(document: Document) -> StoredSubscription:
    subscribe = msgspec.json.decode(document["subscribe"], type=Subscribe)
    return StoredSubscription(document["_id"], document["match_key"], subscribe)


def _event(document: Document) -> StoredEvent:
    return StoredEvent(
        id=document["_id"],
        seq=document["seq"],
        key=document["key"],
        payload=document["payload"],
        scope=document["scope"],
        metadata=msgspec.json.decode(document["metadata"]),
        priority=document["priority"],
        seen_at=document["seen_at"],
    )
