"""Decodes a batch of messages, in the order of their arrival."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import assert_never

from msgspec.structs import replace

from sublet_engine.event import intake
from sublet_platform.ports import Clock, Delivery, StoredEvent
from sublet_protocol import limits
from sublet_protocol.messages import MalformedMessage, RegisterTriggers, Subscribe, Unsubscribe, decode_for_ingest
from sublet_protocol.topology import EVENTS


@dataclass(slots=True)
class Batch:
    """The decoded batch. Each event, subscription and workflow occurs once."""

    events: dict[str, StoredEvent] = field(default_factory=dict)
    """By id. The first of several with the same id."""
    subscribes: dict[str, Subscribe] = field(default_factory=dict)
    unsubscribes: dict[str, None] = field(default_factory=dict)
    triggers: dict[str, RegisterTriggers] = field(default_factory=dict)
    """The latest by workflow."""
    refused: list[tuple[Delivery, str]] = field(default_factory=list)
    """Refused deliveries with the reason."""

    @property
    def highest_since(self) -> int:
        """The position of the latest wait of the batch. All later events must have greater positions."""
        return max((subscribe.since for subscribe in self.subscribes.values()), default=0)


class Reader:
    """Decodes deliveries, and gives each event its position in the order of all events.

    A batch that failed is read again, or message by message: its events keep their ids and positions until `settled`.
    """

    def __init__(self, clock: Clock, new_id: Callable[[], str]) -> None:
        self.sequence = intake.Sequence()
        self._clock = clock
        self._new_id = new_id
        self._read_before: dict[Delivery, StoredEvent] = {}

    def read(self, deliveries: Sequence[Delivery]) -> Batch:
        batch = Batch()
        for delivery in deliveries:
            try:
                if delivery.exchange == EVENTS:
                    event = self._event(delivery)
                    batch.events.setdefault(event.id, event)
                else:
                    self._read_commands(batch, delivery)
            except intake.InvalidEvent as error:
                batch.refused.append((delivery, f"not an event: {error}"))
            except MalformedMessage as error:
                batch.refused.append((delivery, f"not a message for event-ingest: {error}"))
        return batch

    def settled(self, deliveries: Sequence[Delivery]) -> None:
        """These deliveries are settled, so they are not read again, nor is any delivery of another channel."""
        if self._read_before:
            channels, done = {delivery.channel for delivery in deliveries}, set(deliveries)
            self._read_before = {
                delivery: event
                for delivery, event in self._read_before.items()
                if delivery.channel in channels and delivery not in done
            }

    def _event(self, delivery: Delivery) -> StoredEvent:
        event = self._read_before.get(delivery)
        if event is None:
            event = self._read_before[delivery] = self._new_event(delivery)
        return event

    def _new_event(self, delivery: Delivery) -> StoredEvent:
        arrival = intake.parse_event(
            delivery.body,
            delivery.routing_key,
            delivery.message_id,
            delivery.headers,
            seen_at=self._clock.now(),
            new_id=self._new_id,
        )
        return StoredEvent(
            id=arrival.id,
            seq=self.sequence.next(arrival.seen_at),
            key=arrival.key,
            payload=arrival.payload,
            scope=arrival.scope,
            metadata=arrival.metadata,
            priority=arrival.priority,
            seen_at=arrival.seen_at,
        )

    def _read_commands(self, batch: Batch, delivery: Delivery) -> None:
        for command in decode_for_ingest(delivery.body):
            match command:
                case Subscribe():
                    command = self._in_order(command)
                    batch.unsubscribes.pop(command.id, None)
                    batch.subscribes[command.id] = command
                case Unsubscribe():
                    batch.subscribes.pop(command.id, None)
                    batch.unsubscribes[command.id] = None
                case RegisterTriggers():
                    known = batch.triggers.get(command.workflow)
                    if known is None or command.at >= known.at:
                        batch.triggers[command.workflow] = command
                case _:
                    assert_never(command)

    def _in_order(self, subscribe: Subscribe) -> Subscribe:
        """An event that arrives after the wait gets a later position than the wait, independent of the clocks.

        A position far in the future, which no clock of ours can have given, must not move the positions of all
        events. Such a wait listens from the current position.
        """
        ahead = int((self._clock.now() + limits.CLOCK_AHEAD_MAX_S) * 1_000_000)
        if subscribe.since > ahead:
            return replace(subscribe, since=self.sequence.last)
        self.sequence.advance_past(subscribe.since)
        return subscribe
