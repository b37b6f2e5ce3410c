"""Where effects go: the destinations of the engine as exchanges and routing keys, many messages in one body."""

from __future__ import annotations

from collections.abc import Iterable

from sublet_engine.shard.unit_of_work import Publication
from sublet_platform.ports import Outgoing
from sublet_protocol.chunking import bodies_of
from sublet_protocol.topology import INBOXES, NOTICES, REQUESTS, pool_queue


def outgoing(publications: Iterable[Publication], shards: int) -> list[Outgoing]:
    """Messages to one destination travel together, in order; tickets and notices alone."""
    singles: list[Outgoing] = []
    groups: dict[str, list[bytes]] = {}
    for publication in publications:
        kind, _, rest = publication.to.partition(":")
        if kind == "pool":
            pool, _, slot_kind = rest.rpartition(":")
            queue = pool_queue(pool, slot_kind).name
            singles.append(Outgoing("", queue, publication.body, persistent=False))
        elif kind == "notice":
            singles.append(Outgoing(NOTICES, rest, publication.body, persistent=False))
        elif kind == "bucket":
            groups.setdefault(f"bucket:{_key_of_shard(rest, shards)}", []).append(publication.body)
        else:
            groups.setdefault(publication.to, []).append(publication.body)
    return singles + [message for to, bodies in groups.items() for message in _gathered(to, bodies)]


def _key_of_shard(bucket_key: str, shards: int) -> str:
    """The key that stands for all buckets of the shard (see `ids.bucket_key`)."""
    return f"bucket.{int(bucket_key.removeprefix('bucket.')) % shards:02d}"


def _gathered(to: str, bodies: list[bytes]) -> Iterable[Outgoing]:
    exchange, routing_key, persistent = _address(to)
    for body in bodies_of(bodies):
        yield Outgoing(exchange, routing_key, body, persistent=persistent)


def _address(to: str) -> tuple[str, str, bool]:
    kind, _, rest = to.partition(":")
    match kind:
        case "bucket":
            return REQUESTS, rest, True
        case "inbox":
            return INBOXES, rest, False
        case "timers" | "ingest":
            return "", f"sublet.{kind}", True
        case _:
            raise AssertionError(f"unknown destination {to!r}")
