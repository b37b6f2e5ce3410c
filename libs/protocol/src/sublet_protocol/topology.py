"""Exchanges, queues and bindings: their names, and what belongs together. Adapters declare what `topology` describes.

Queues of services are quorum queues with a single active consumer. What bounces too often ends in ``sublet.dead``
instead of being dropped. Pool queues are declared by workers (see `pool_queue`), inboxes by their owners.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from sublet_protocol import ids

FORMAT = 2
"""The number of the format of stored documents, messages, routing keys and queues. A service refuses a database or a
virtual host that another format was used with. Count it up with every change that an older version cannot read."""

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
"""A message for one of these exchanges that no queue takes counts as not published. For the others nobody may listen:
an inbox's owner is gone, no one watches."""

DELIVERY_LIMIT = 1_000
"""Returns of one message before it is dead-lettered. High, because every restart of a consumer counts for all that
it had in hand; set, because a message that kills its consumer must not do so for ever. RabbitMQ 4 would say 20."""
DEAD_DELIVERY_LIMIT = 1_000_000_000
"""Whoever looks at dead letters gives them back each time, and of these none may be dropped. RabbitMQ 3 knows no word
for no limit."""

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

    All keys of a shard lead to one queue. A publisher that knows the number of shards uses one key for each shard, so
    that messages about many runs fit into one.
    """
    return bucket_key(ids.bucket_of(run_id) % shards)


def shard_key(shard: int, shards: int) -> str:
    """The key that `run_key` gives for every run of this shard."""
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
    """One consumer at a time, majority of the nodes, nothing dropped."""
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
    """All that the services need, for this number of shards (1 to `ids.BUCKETS`)."""
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
