"""Translates the outgoing messages of the engine into AMQP messages."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple, assert_never

from sublet_engine.run.state import OutgoingMessage
from sublet_platform.ports import Outgoing
from sublet_protocol.chunking import bodies_of
from sublet_protocol.destinations import Bucket, Destination, Inbox, Ingest, Notice, Pool, Timer
from sublet_protocol.topology import INBOXES, INGEST, NOTICES, REQUESTS, TIMERS, bucket_key, pool_queue


class Route(NamedTuple):
    exchange: str
    routing_key: str
    persistent: bool = False
    single: bool = False
    """Each message has an AMQP message of its own."""


def outgoing(messages: Iterable[OutgoingMessage], shards: int) -> list[Outgoing]:
    """Messages to one destination share bodies and keep their order. Tickets and notices come first, one a body."""
    singles: list[Outgoing] = []
    groups: dict[Route, list[bytes]] = {}
    for message in messages:
        route = route_of(message.to, shards)
        if route.single:
            singles.append(_amqp_message(route, message.body))
        else:
            groups.setdefault(route, []).append(message.body)
    return singles + [_amqp_message(route, body) for route, bodies in groups.items() for body in bodies_of(bodies)]


def route_of(to: Destination, shards: int) -> Route:
    match to:
        case Bucket():  # one key for all buckets of a shard, so that messages about many runs share a body
            return Route(REQUESTS, bucket_key(to.bucket % shards), persistent=True)
        case Inbox():
            return Route(INBOXES, to.name)
        case Timer():
            return Route("", TIMERS, persistent=True)
        case Ingest():
            return Route("", INGEST, persistent=True)
        case Pool():
            return Route("", pool_queue(to.pool, to.kind).name, single=True)
        case Notice():
            return Route(NOTICES, to.routing_key, single=True)
        case _:
            assert_never(to)


def _amqp_message(route: Route, body: bytes) -> Outgoing:
    return Outgoing(route.exchange, route.routing_key, body, persistent=route.persistent)
