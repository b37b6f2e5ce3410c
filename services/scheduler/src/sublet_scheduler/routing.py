"""Where effects go: the destinations of the engine as exchanges and routing keys, many messages in one body."""

from __future__ import annotations

from collections.abc import Iterable

from sublet_engine.shard.unit_of_work import Publication
from sublet_platform.ports import Outgoing
from sublet_protocol import limits


def outgoing(publications: Iterable[Publication], shards: int) -> list[Outgoing]:
    """Messages to one destination travel together, in order; tickets and notices alone."""
    singles: list[Outgoing] = []
    groups: dict[str, list[bytes]] = {}
    for publication in publications:
        kind, _, rest = publication.to.partition(":")
        if kind == "pool":
            pool, _, slot_kind = rest.rpartition(":")
            queue = f"sublet.pool.{pool}.{slot_kind}"
            singles.append(Outgoing("", queue, publication.body, persistent=False))
        elif kind == "notice":
            singles.append(Outgoing("sublet.notices", rest, publication.body, persistent=False))
        elif kind == "slot":
            groups.setdefault(f"slot:{_key_of_shard(rest, shards)}", []).append(publication.body)
        else:
            groups.setdefault(publication.to, []).append(publication.body)
    return singles + [message for to, bodies in groups.items() for message in _gathered(to, bodies)]


def _key_of_shard(bucket_key: str, shards: int) -> str:
    """The key that stands for all hash slots of the shard (see `ids.bucket_key`)."""
    return f"slot.{int(bucket_key.removeprefix('slot.')) % shards:02d}"


def _gathered(to: str, bodies: list[bytes]) -> Iterable[Outgoing]:
    exchange, routing_key, persistent = _address(to)
    for chunk in _chunks(bodies):
        yield Outgoing(exchange, routing_key, b"[" + b",".join(chunk) + b"]", persistent=persistent)


def _address(to: str) -> tuple[str, str, bool]:
    kind, _, rest = to.partition(":")
    match kind:
        case "slot":
            return "sublet.requests", rest, True
        case "inbox":
            return "sublet.inboxes", rest, False
        case "timers" | "ingest":
            return "", f"sublet.{kind}", True
        case _:
            raise AssertionError(f"unknown destination {to!r}")


def _chunks(bodies: list[bytes]) -> Iterable[list[bytes]]:
    chunk: list[bytes] = []
    size = 0
    for body in bodies:
        if chunk and (len(chunk) >= limits.BATCH_MAX_ITEMS or size + len(body) > limits.BATCH_MAX_BYTES):
            yield chunk
            chunk, size = [], 0
        chunk.append(body)
        size += len(body)
    if chunk:
        yield chunk
