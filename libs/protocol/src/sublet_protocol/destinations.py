"""Destinations of messages. They are stored with the outbox of a run, so each kind pins its tag.

A service translates a destination into an exchange and a routing key (see `topology`).
"""

from __future__ import annotations

import msgspec

from sublet_protocol.specs import SlotKind


class Bucket(msgspec.Struct, frozen=True, array_like=True, tag="bucket"):
    """The shard that owns the runs of this bucket (0 to 63)."""

    bucket: int


class Inbox(msgspec.Struct, frozen=True, array_like=True, tag="inbox"):
    """The inbox of a worker or client."""

    name: str


class Timer(msgspec.Struct, frozen=True, array_like=True, tag="timer"):
    """The timer service."""


class Ingest(msgspec.Struct, frozen=True, array_like=True, tag="ingest"):
    """The event-ingest service."""


class Pool(msgspec.Struct, frozen=True, array_like=True, tag="pool"):
    """The ready queue of a pool and slot kind, for tickets."""

    pool: str
    kind: SlotKind


class Notice(msgspec.Struct, frozen=True, array_like=True, tag="notice"):
    """The consumers of notices with this routing key."""

    routing_key: str


Destination = Bucket | Inbox | Timer | Ingest | Pool | Notice
