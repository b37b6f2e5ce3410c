"""Exchanges, queues and bindings with their names. Adapters declare what `topology` describes.

Queues of services are quorum queues with a single active consumer. A message that is returned too often goes to
``sublet.dead`` instead of being dropped. Workers declare pool queues (see `pool_queue`), owners declare their inboxes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from sublet_protocol import ids

FORMAT = 3
"""The number of the format of stored documents, messages, routing keys and queues. A service refuses a database or a
virtual host that was used with another format. Raise it with every change that another version cannot read."""

FORMAT_MARKER = f"sublet.format.{FORMAT}"
"""An exchange that no message uses: its presence tells the format of a virtual host. Declared before all others."""

REQUESTS = "sublet.requests"
WORKERS = "sublet.workers"
INBOXES = "sublet.inboxes"
EVENTS = "sublet.events"
NOTICES = "sublet.notices"
DEAD = "sublet.dead"
"""Exchange and queue."""

TIMERS = "sublet.timers"
INGEST = "sublet.ingest"
QUERIES = "sublet.queries"
QUERY_KEY = "query"

MUST_ARRIVE = frozenset((REQUESTS, WORKERS, EVENTS, DEAD, ""))
"""Exchanges whose messages must reach a queue: otherwise the publish fails. Messages of the other exchanges may have no
receiver: the owner of an inbox has stopped, or nobody consumes notices."""

DELIVERY_LIMIT = 1_000
"""Deliveries of one message before it is dead-lettered. The number is high, because a restart of a consumer counts for
all its unacknowledged messages. It is not infinite, because a message that crashes its consumer must not do so without
end. The default of RabbitMQ 4 is 20."""
DEAD_DELIVERY_LIMIT = 1_000_000_000
"""Inspecting dead letters requeues them each time, so the limit must be practically infinite. RabbitMQ 3 cannot disable
it."""

POOL_QUEUE_EXPIRES_MS = 3_600_000
"""RabbitMQ deletes the queue of a pool an hour after its last worker. Lost tickets are issued again."""
TICKET_ACK_TIMEOUT_MS = 86_400_000
"""RabbitMQ closes a channel that holds a delivery for longer than this. Its default of half an hour is too short: a
worker holds a ticket for as long as the ticket's slot is taken."""
POOL_ARGUMENTS: Mapping[str, str | int | bool] = {
    "x-expires": POOL_QUEUE_EXPIRES_MS,
    "x-consumer-timeout": TICKET_ACK_TIMEOUT_MS,
}

ExchangeType = Literal["direct", "fanout", "topic"]


@dataclass(frozen=True, slots=True)
class Exchange:
    name: str
    type: ExchangeType


@dataclass(frozen=True, slots=True)
class Queue:
    """A durable queue; ``arguments`` as RabbitMQ names them."""

    name: str
    arguments: Mapping[str, str | int | bool] = field(default_factory=dict)

    @property
    def single_active_consumer(self) -> bool:
        return bool(self.arguments.get("x-single-active-consumer"))


@dataclass(frozen=True, slots=True)
class Binding:
    exchange: str
    queue: str
    routing_key: str


@dataclass(frozen=True, slots=True)
class Topology:
    exchanges: tuple[Exchange, ...]
    queues: tuple[Queue, ...]
    bindings: tuple[Binding, ...]


def shard_queue(shard: int) -> str:
    return f"sublet.shard.{shard}"


def bucket_key(bucket: int) -> str:
    """The routing key, on `REQUESTS`, of the messages about runs of this bucket."""
    return f"bucket.{bucket:02d}"


def run_key(run_id: str, shards: int = ids.BUCKETS) -> str:
    """The routing key, on `REQUESTS`, of the messages about this run.

    All keys of a shard are bound to one queue. A publisher that knows the number of shards uses one key for each shard,
    so that it can send messages about many runs in one body.
    """
    return bucket_key(ids.bucket_of(run_id) % shards)


def shard_key(shard: int, shards: int) -> str:
    """The routing key that `run_key` returns for every run of this shard."""
    return bucket_key(ids.buckets_of_shard(shard, shards)[0])


def worker_inbox(worker_id: str) -> str:
    """The queue, and its routing key on `INBOXES`, for messages to one worker."""
    return f"sublet.inbox.worker.{worker_id}"


def client_inbox(client_id: str) -> str:
    """The queue, and its routing key on `INBOXES`, for results and answers to one client."""
    return f"sublet.inbox.client.{client_id}"


def scheduler_inbox(scheduler_id: str, shard: int) -> str:
    """The queue in which one scheduler process receives the claims for one shard."""
    return f"sublet.inbox.scheduler.{scheduler_id}.{shard}"


def claim_key(shard: int) -> str:
    """The routing key, on `INBOXES`, of claims for tickets of this shard. Every scheduler receives them."""
    return f"sublet.inbox.shard.{shard}"


def pool_queue(pool: str, kind: str) -> Queue:
    """The ready queue of a pool and slot kind (``task`` or ``durable``)."""
    return Queue(f"sublet.pool.{pool}.{kind}", POOL_ARGUMENTS)


def service_queue(name: str) -> Queue:
    """A quorum queue with a single active consumer that drops no message."""
    return Queue(
        name,
        {
            "x-queue-type": "quorum",
            "x-single-active-consumer": True,
            "x-delivery-limit": DELIVERY_LIMIT,
            "x-dead-letter-exchange": DEAD,
            "x-dead-letter-strategy": "at-least-once",
            "x-overflow": "reject-publish",
        },
    )


def topology(shards: int) -> Topology:
    """All exchanges, queues and bindings of the services, for this number of shards (1 to `ids.BUCKETS`)."""
    if not 1 <= shards <= ids.BUCKETS:
        raise ValueError(f"the number of shards must be from 1 to {ids.BUCKETS}, not {shards}")
    bindings = [
        Binding(DEAD, DEAD, ""),
        Binding(EVENTS, INGEST, "#"),
        Binding(REQUESTS, QUERIES, QUERY_KEY),
    ]
    for shard in range(shards):
        bindings.append(Binding(WORKERS, shard_queue(shard), ""))
        bindings += [Binding(REQUESTS, shard_queue(shard), bucket_key(s)) for s in ids.buckets_of_shard(shard, shards)]
    return Topology(
        exchanges=(
            Exchange(FORMAT_MARKER, "fanout"),
            Exchange(REQUESTS, "direct"),
            Exchange(WORKERS, "fanout"),
            Exchange(INBOXES, "direct"),
            Exchange(EVENTS, "topic"),
            Exchange(NOTICES, "topic"),
            Exchange(DEAD, "fanout"),
        ),
        queues=(
            Queue(DEAD, {"x-queue-type": "quorum", "x-delivery-limit": DEAD_DELIVERY_LIMIT}),
            service_queue(TIMERS),
            service_queue(INGEST),
            Queue(QUERIES),
            *(service_queue(shard_queue(shard)) for shard in range(shards)),
        ),
        bindings=tuple(bindings),
    )
