"""Handles a batch of event-ingest: store, register, match, publish. The batch loop acknowledges.

Events are stored before they are matched, and waits are registered before they look back. So in either order of
arrival, one of the two finds the other. Receivers are idempotent, so messages may be published twice. After a crash at
any point the deliveries are redelivered, and all steps are repeated.

During a takeover two processes may be active for a moment. This only causes repeated work: the cached field sets are
checked against the stored ones after the events have been stored, and the deliveries that the former process did not
acknowledge are redelivered.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from sublet_engine.event.intake import ParsedEvent
from sublet_engine.event.matching import FieldSet, Waits, event_matched, index_key, lookup_keys
from sublet_engine.event.triggers import Triggers
from sublet_event_ingest.metrics import IngestMetrics
from sublet_event_ingest.reader import Batch, Reader
from sublet_platform.dead_letters import dead_letter
from sublet_platform.metrics import ServiceMetrics
from sublet_platform.ports import (
    Broker,
    Clock,
    Delivery,
    EventStore,
    Outgoing,
    StoredEvent,
    StoredSubscription,
    TriggerRecord,
)
from sublet_protocol import ids
from sublet_protocol.cel.expressions import ExpressionError
from sublet_protocol.chunking import pack
from sublet_protocol.messages import Record, RegisterTriggers, RunRequest, Subscribe
from sublet_protocol.specs import EventCondition
from sublet_protocol.topology import REQUESTS, run_key

logger = logging.getLogger(__name__)

LOOK_BACK_PAGE = 500
"""Stored events in one page of a look-back."""

FIELD_SETS_CACHE_MAX = 50_000
"""Event keys whose field sets are cached. A full cache is emptied."""

PUBLISH_MAX_BYTES = 16 * 1_048_576
"""Bytes that are published together, and are in memory until they are confirmed."""

COUNT_INTERVAL_S = 10.0
"""The interval at which the gauge of subscriptions is updated."""


class Match(NamedTuple):
    """An event that satisfies a wait."""

    subscribe: Subscribe
    event: StoredEvent


class Ingest:
    def __init__(
        self,
        *,
        store: EventStore,
        broker: Broker,
        clock: Clock,
        new_id: Callable[[], str],
        metrics: ServiceMetrics,
        ingest_metrics: IngestMetrics,
        shards: int = ids.BUCKETS,
    ) -> None:
        self._store, self._broker, self._clock = store, broker, clock
        self._shards = shards
        self._metrics, self._counts = metrics, ingest_metrics
        self._reader = Reader(clock, new_id)
        self._channel: Hashable = None
        self._field_sets: dict[str, set[FieldSet]] = {}
        self._triggers: Triggers | None = None
        self._count_again_at = 0.0
        self._passed = 0
        """The stored position. The next owner gives events later positions."""

    def drop(self) -> None:
        """Drop all caches. The next batch reads them again."""
        self._channel = None

    async def process(self, deliveries: list[Delivery]) -> None:
        """Handle a whole batch. Raises StoreUnavailable or BrokerUnavailable; then it must be handled again."""
        await self._begin_ownership(deliveries)
        batch = self._reader.read(deliveries)
        (parsed_events, new), _, _ = await asyncio.gather(
            self._store_events(list(batch.events.values())),
            self._load_field_sets(batch),
            self._update_triggers(list(batch.triggers.values())),
        )
        waits, field_sets = self._index(batch.subscribes.values())
        live, _, _ = await asyncio.gather(
            self._match_live(parsed_events, batch),
            self._register(waits, field_sets, list(batch.unsubscribes)),
            self._advance_past(batch.highest_since),
        )
        matches = live + await self._look_back(Waits(waits))
        await self._publish_matches(matches, self._triggered(parsed_events))
        for delivery, reason in batch.refused:
            await dead_letter(self._broker, delivery, reason, self._metrics, "ingest")
        self._reader.settled(deliveries)
        await self._count(batch, new)

    # --- caches -----------------------------------------------------------------------------------------------

    async def _begin_ownership(self, deliveries: Sequence[Delivery]) -> None:
        """Drop the caches if the channel is new, because another process may have been active in between."""
        channel = deliveries[-1].channel
        if channel != self._channel:
            self._field_sets.clear()
            self._triggers = None
            self._passed = await self._store.last_seq()
            self._reader.sequence.advance_past(self._passed)
            self._channel = channel

    async def _advance_past(self, position: int) -> None:
        """Store this position unless a later one is stored. An event after a wait must have a later position than the
        wait. The next owner continues after the last stored event, which may be before the wait."""
        if position > self._passed:
            await self._store.advance_past(position)
            self._passed = position

    async def _load_field_sets(self, batch: Batch) -> None:
        keys = {event.key for event in batch.events.values()}
        keys.update(_event_key(subscribe) for subscribe in batch.subscribes.values())
        if len(self._field_sets) > FIELD_SETS_CACHE_MAX:
            self._field_sets.clear()
        unknown = sorted(keys - self._field_sets.keys())
        if unknown:
            stored = await self._store.load_field_sets(unknown)
            self._field_sets.update((key, set(stored.get(key, ()))) for key in unknown)

    async def _update_triggers(self, registrations: Sequence[RegisterTriggers]) -> None:
        if registrations:
            await asyncio.gather(
                *(
                    self._store.save_trigger(TriggerRecord(each.workflow, each.on_events, each.filters), each.at)
                    for each in registrations
                )
            )
        if registrations or self._triggers is None:
            self._triggers = Triggers(await self._store.load_triggers())

    # --- events -----------------------------------------------------------------------------------------------

    async def _store_events(self, events: Sequence[StoredEvent]) -> tuple[list[ParsedEvent[StoredEvent]], set[str]]:
        """The stored events of the batch in order, and the ids of those that are new.

        An event that was stored before is matched again: a crash may have happened between storing and matching it.
        """
        if not events:
            return [], set()
        repeated = await self._store.insert_events(events)
        stored = [event for event in events if event.id not in repeated]
        new = {event.id for event in stored}
        self._passed = max([self._passed, *(event.seq for event in stored)])
        if repeated:
            stored += await self._store.get_events(sorted(repeated))
        return [ParsedEvent(event) for event in sorted(stored, key=lambda event: event.seq)], new

    async def _match_live(self, parsed_events: Sequence[ParsedEvent[StoredEvent]], batch: Batch) -> list[Match]:
        """Match the events with the waits registered before this batch. The waits of the batch look back instead."""
        if not parsed_events:
            return []
        keys, found = await self._look_up(parsed_events)
        changed = batch.subscribes.keys() | batch.unsubscribes.keys()
        waits = Waits(each for each in found if each.id not in changed)
        matches = [
            Match(subscribe, parsed_event.event)
            for parsed_event, keys_of_event in zip(parsed_events, keys, strict=True)
            for subscribe in waits.satisfied_by(parsed_event, keys_of_event)
        ]
        self._counts.expression_failures.inc(waits.failures)
        return matches

    async def _look_up(
        self, parsed_events: Sequence[ParsedEvent[StoredEvent]]
    ) -> tuple[list[list[str]], list[StoredSubscription]]:
        """The match keys of each event, and the waits with these keys. The cached field sets are right unless another
        process has added one, so they are checked in the same step, which rarely costs another query."""
        keys = self._lookup_keys(parsed_events)
        asked = {key for each in keys for key in each}
        found, stored = await asyncio.gather(
            self._store.find_subscriptions(sorted(asked)),
            self._store.load_field_sets(sorted({parsed_event.event.key for parsed_event in parsed_events})),
        )
        for event_key, field_sets in stored.items():
            self._field_sets[event_key].update(field_sets)
        keys = self._lookup_keys(parsed_events)
        missing = {key for each in keys for key in each} - asked
        if missing:
            found = [*found, *await self._store.find_subscriptions(sorted(missing))]
        return keys, found

    def _lookup_keys(self, parsed_events: Sequence[ParsedEvent[StoredEvent]]) -> list[list[str]]:
        return [lookup_keys(parsed_event, self._field_sets[parsed_event.event.key]) for parsed_event in parsed_events]

    def _triggered(self, parsed_events: Sequence[ParsedEvent[StoredEvent]]) -> list[RunRequest]:
        triggers = self._triggers
        assert triggers is not None
        runs = [run for parsed_event in parsed_events for run in triggers.runs(parsed_event)]
        self._counts.expression_failures.inc(triggers.failures)
        triggers.failures = 0
        return runs

    # --- waits ------------------------------------------------------------------------------------------------

    def _index(self, subscribes: Iterable[Subscribe]) -> tuple[list[StoredSubscription], dict[str, list[FieldSet]]]:
        """The subscriptions to store, and the field sets that are new for their event keys."""
        waits: list[StoredSubscription] = []
        added: dict[str, list[FieldSet]] = {}
        for subscribe in subscribes:
            condition = subscribe.condition
            if not isinstance(condition, EventCondition):
                logger.error("subscription %s has no event condition: %r", subscribe.id, condition)
                continue
            known = self._field_sets[condition.event_key]
            try:
                key = index_key(condition, known)
            except ExpressionError as error:
                # The SDK refuses such a wait. It can never be satisfied, and must not fail the others.
                logger.error("subscription %s: %s", subscribe.id, error)
                self._counts.expression_failures.inc()
                continue
            if key.field_set and key.field_set not in known:
                known.add(key.field_set)
                added.setdefault(condition.event_key, []).append(key.field_set)
            waits.append(StoredSubscription(subscribe.id, key.match_key, subscribe))
        return waits, added

    async def _register(
        self,
        waits: Sequence[StoredSubscription],
        field_sets: Mapping[str, Sequence[FieldSet]],
        unsubscribed: Sequence[str],
    ) -> None:
        """Store the field sets first: the lookup of an event without them would miss the wait."""
        if field_sets:
            await self._store.save_field_sets(field_sets)
        if waits or unsubscribed:
            await self._store.change_subscriptions(waits, unsubscribed)

    async def _look_back(self, waits: Waits) -> list[Match]:
        """Match the waits with the stored events, the earliest event first."""
        matches: list[Match] = []
        seen = 0
        while waits:
            after = {key: max(start, seen) for key, start in waits.starts().items()}
            page = await self._store.events_after(after, LOOK_BACK_PAGE)
            for event in page:
                parsed_event = ParsedEvent(event)
                keys = lookup_keys(parsed_event, self._field_sets[event.key])
                matches += [Match(subscribe, event) for subscribe in waits.satisfied_by(parsed_event, keys)]
            if len(page) < LOOK_BACK_PAGE:
                break
            seen = page[-1].seq
        self._counts.expression_failures.inc(waits.failures)
        return matches

    # --- results ----------------------------------------------------------------------------------------------

    async def _publish_matches(self, matches: Sequence[Match], runs: Sequence[RunRequest]) -> None:
        """Publish the matches, and only then delete the subscriptions."""
        await self._publish(_addressed(matches, runs, self._shards))
        if matches:
            await self._store.change_subscriptions([], [match.subscribe.id for match in matches])
        self._counts.matches.inc(len(matches) + len(runs))

    async def _publish(self, addressed: Iterable[tuple[str, Record]]) -> None:
        """Publish in parts, because one event may satisfy any number of waits, each with a copy of the payload."""
        part: list[Outgoing] = []
        size = 0
        for key, body in pack(addressed):
            part.append(Outgoing(REQUESTS, key, body))
            size += len(body)
            if size >= PUBLISH_MAX_BYTES:
                await self._broker.publish(part)
                part, size = [], 0
        if part:
            await self._broker.publish(part)

    async def _count(self, batch: Batch, new: set[str]) -> None:
        self._counts.events.labels("stored").inc(len(new))
        self._counts.events.labels("duplicate").inc(len(batch.events) - len(new))
        self._counts.events.labels("refused").inc(len(batch.refused))
        now = self._clock.now()
        if now >= self._count_again_at:
            self._counts.subscriptions.set(await self._store.count_subscriptions())
            self._count_again_at = now + COUNT_INTERVAL_S


def _addressed(matches: Iterable[Match], runs: Iterable[RunRequest], shards: int) -> Iterator[tuple[str, Record]]:
    """The messages with the routing keys of their shards."""
    for subscribe, event in matches:
        yield run_key(ids.run_of(subscribe.task_run_id), shards), event_matched(subscribe, event)
    for run in runs:
        yield run_key(run.run_id, shards), run


def _event_key(subscribe: Subscribe) -> str:
    condition = subscribe.condition
    return condition.event_key if isinstance(condition, EventCondition) else ""
