"""``client.event``: publish events."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import msgspec

from sublet._client.config import ClientConfig
from sublet._client.connection import Connection
from sublet._declare.serialization import check_name, encode_object
from sublet._declare.types import JSON, BulkPushEventWithMetadata, Priority
from sublet._worker.context import current_context
from sublet_protocol import limits


@dataclass(frozen=True, slots=True)
class Event:
    """An event that was published. ``payload`` and ``additional_metadata`` are JSON texts."""

    event_id: str
    key: str
    """With its namespace."""
    payload: str
    event_timestamp: datetime
    additional_metadata: str | None
    scope: str | None
    seen_at: datetime


class EventClient:
    """Publishes to the exchange ``sublet.events``, as any AMQP client can."""

    def __init__(self, connection: Connection, config: ClientConfig) -> None:
        self._connection = connection
        self._config = config

    def push(
        self,
        event_key: str,
        payload: JSON,
        additional_metadata: JSON | None = None,
        priority: int | Priority | None = None,
        scope: str | None = None,
    ) -> Event:
        """Publish an event; returns when the broker has it. Blocks this thread.

        Args:
            event_key: what waits and triggers know it by.
            payload: a JSON object; expressions see it as ``input``.
            additional_metadata: goes to the runs that the event starts.
            priority: of the runs that the event starts.
            scope: only waits and filters with this scope, and waits with none, see it.

        Raises:
            ValueError: the key is not valid; payload or metadata cannot be written as JSON, or are too large.
            TransportUnavailable: the broker did not confirm in time.
        """
        (event,) = self.bulk_push([_bulk_item(event_key, payload, additional_metadata, priority, scope)])
        return event

    async def aio_push(
        self,
        event_key: str,
        payload: JSON,
        additional_metadata: JSON | None = None,
        priority: int | Priority | None = None,
        scope: str | None = None,
    ) -> Event:
        """As `push`."""
        (event,) = await self.aio_bulk_push([_bulk_item(event_key, payload, additional_metadata, priority, scope)])
        return event

    def bulk_push(self, events: Sequence[BulkPushEventWithMetadata]) -> list[Event]:
        """Publish many events at once; they may arrive in another order. Errors as in `push`; nothing is published if
        one of them is not valid."""
        made = [self._made(event) for event in events]
        self._connection.sync(self._publish(made))
        return [event for event, _, _ in made]

    async def aio_bulk_push(self, events: Sequence[BulkPushEventWithMetadata]) -> list[Event]:
        """As `bulk_push`."""
        made = [self._made(event) for event in events]
        await self._connection.aio(self._publish(made))
        return [event for event, _, _ in made]

    async def _publish(self, made: Sequence[tuple[Event, bytes, dict[str, object]]]) -> None:
        await asyncio.gather(
            *(self._connection.push(event.key, event.event_id, body, headers) for event, body, headers in made)
        )

    def _made(self, item: BulkPushEventWithMetadata) -> tuple[Event, bytes, dict[str, object]]:
        key = check_name(self._config.apply_namespace(item.key), "the key of an event")
        body = encode_object(item.payload, f"The payload of event {key!r}", limits.PAYLOAD_MAX_BYTES)
        metadata = encode_object(
            {**_source(), **item.additional_metadata}, f"The metadata of event {key!r}", limits.METADATA_MAX_BYTES
        )
        headers: dict[str, object] = msgspec.json.decode(metadata, type=dict[str, object])
        for name in headers:
            if name in ("scope", "priority") or name.startswith("x-"):
                raise ValueError(
                    f"the metadata of event {key!r} must not have an entry {name!r}: metadata travel as AMQP headers,"
                    " where scope, priority and what begins with x- have a meaning of their own"
                )
        if item.scope is not None:
            headers["scope"] = check_name(item.scope, "the scope of an event")
        if item.priority is not None:
            headers["priority"] = int(item.priority)
        at = datetime.fromtimestamp(self._connection.now(), UTC)
        event = Event(
            event_id=self._connection.new_id(),
            key=key,
            payload=body.decode(),
            event_timestamp=at,
            additional_metadata=None if metadata == b"{}" else metadata.decode(),
            scope=item.scope,
            seen_at=at,
        )
        return event, body, headers


def _bulk_item(
    key: str, payload: JSON, metadata: JSON | None, priority: int | Priority | None, scope: str | None
) -> BulkPushEventWithMetadata:
    return BulkPushEventWithMetadata(
        key=key,
        payload=dict(payload),
        additional_metadata=dict(metadata or {}),
        priority=None if priority is None else Priority(priority),
        scope=scope,
    )


def _source() -> dict[str, str]:
    """Which task published it, if one did."""
    context = current_context.get()
    if context is None:
        return {}
    return {
        "sublet__source_workflow_run_id": context.workflow_run_id,
        "sublet__source_task_run_id": context.task_run_id,
    }
