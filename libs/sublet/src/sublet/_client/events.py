"""``client.event``: publish events."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
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
    """A published event.

    Attributes:
        key: with its namespace.
        payload: JSON text.
        event_timestamp, seen_at: when the client published it.
        additional_metadata: JSON text; None if there are none.
    """

    event_id: str
    key: str
    payload: str
    event_timestamp: datetime
    additional_metadata: str | None
    scope: str | None
    seen_at: datetime


class EventClient:
    """Publishes events to the exchange ``sublet.events``. Any other AMQP client can do the same."""

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
        """Publish an event. Returns when RabbitMQ has confirmed it. Blocks this thread.

        Args:
            event_key: the key that waits and triggers name, without namespace.
            payload: a JSON object; ``input`` in expressions.
            additional_metadata: metadata of the runs that the event starts.
            priority: priority of the runs that the event starts.
            scope: the event is seen by filters with this scope, and by waits with this scope or without one.

        Raises:
            TypeError: the payload is not a dictionary.
            ValueError: the key is not valid, or payload or metadata cannot be written as JSON or are too large.
            TransportUnavailable: RabbitMQ did not confirm the event in time. It may or may not have been published.
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
        """Like `push`, for async code."""
        (event,) = await self.aio_bulk_push([_bulk_item(event_key, payload, additional_metadata, priority, scope)])
        return event

    def bulk_push(self, events: Sequence[BulkPushEventWithMetadata]) -> list[Event]:
        """Publish many events at once. They may arrive in another order. Blocks this thread.

        Raises:
            The same exceptions as `push`. Nothing is published if one of the events is not valid.
        """
        publications = [self._publication(event) for event in events]
        self._connection.sync(self._publish(publications))
        return [event for event, _, _ in publications]

    async def aio_bulk_push(self, events: Sequence[BulkPushEventWithMetadata]) -> list[Event]:
        """Like `bulk_push`, for async code."""
        publications = [self._publication(event) for event in events]
        await self._connection.aio(self._publish(publications))
        return [event for event, _, _ in publications]

    async def _publish(self, publications: Sequence[tuple[Event, bytes, dict[str, object]]]) -> None:
        await asyncio.gather(
            *(self._connection.push(event.key, event.event_id, body, headers) for event, body, headers in publications)
        )

    def _publication(self, item: BulkPushEventWithMetadata) -> tuple[Event, bytes, dict[str, object]]:
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
    if not isinstance(payload, Mapping):
        raise TypeError(
            f"the payload of event {key!r} must be a dictionary, not {type(payload).__name__}; wrap it:"
            ' {"value": payload}'
        )
    return BulkPushEventWithMetadata(
        key=key,
        payload=dict(payload),
        additional_metadata=dict(metadata or {}),
        priority=None if priority is None else Priority(priority),
        scope=scope,
    )


def _source() -> dict[str, str]:
    """Metadata that name the task that publishes the event; empty outside of tasks."""
    context = current_context.get()
    if context is None:
        return {}
    return {
        "sublet__source_workflow_run_id": context.workflow_run_id,
        "sublet__source_task_run_id": context.task_run_id,
    }
