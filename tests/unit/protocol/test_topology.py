"""What is bound to what."""

from __future__ import annotations

import pytest

from sublet_protocol import ids
from sublet_protocol.topology import (
    DEAD,
    REQUESTS,
    WORKERS,
    run_key,
    service_queue,
    shard_queue,
    topology,
)


@pytest.mark.parametrize("shards", [1, 2, 3, 4, 7, 63, 64])
def test_every_hash_slot_belongs_to_one_shard(shards: int) -> None:
    bound = [binding for binding in topology(shards).bindings if binding.exchange == REQUESTS]
    slots = {binding.routing_key: binding.queue for binding in bound if binding.routing_key.startswith("bucket.")}
    assert len(slots) == len([binding for binding in bound if binding.routing_key.startswith("bucket.")])
    for number in range(1_000):
        run_id = f"run-{number}"
        assert slots[run_key(run_id)] == shard_queue(ids.bucket_of(run_id) % shards)


@pytest.mark.parametrize("shards", [0, 65, -1])
def test_a_number_of_shards_that_cannot_be_is_refused(shards: int) -> None:
    with pytest.raises(ValueError, match="shards"):
        topology(shards)


def test_every_shard_hears_of_every_worker() -> None:
    bound = {binding.queue for binding in topology(4).bindings if binding.exchange == WORKERS}
    assert bound == {shard_queue(shard) for shard in range(4)}


def test_what_is_bound_is_declared() -> None:
    wanted = topology(4)
    assert {binding.queue for binding in wanted.bindings} <= {queue.name for queue in wanted.queues}
    assert {binding.exchange for binding in wanted.bindings} <= {exchange.name for exchange in wanted.exchanges}


def test_no_service_queue_drops_what_bounces() -> None:
    queue = service_queue("sublet.timers")
    assert queue.single_active_consumer
    assert queue.arguments["x-dead-letter-exchange"] == DEAD
    assert queue.arguments["x-delivery-limit"]
