"""Ids and keys. Every id that could be created twice is derived, so creating it twice is harmless.

======================  =====================================================================
id                      form
======================  =====================================================================
run                     a UUID: random for a request from outside, derived for child and trigger
task run                ``<run id>.<task name>``
lease                   ``<task run id>@<invocation>``; an invocation number is never used twice
bucket                  ``crc32(run id) % 64``: decides the shard, see :func:`bucket_of`
======================  =====================================================================
"""

from __future__ import annotations

import uuid
import zlib

BUCKETS = 64
"""Runs are spread over this many buckets; each shard owns some of them. A routing key names a bucket, so publishers
never need to know how many shards there are."""

_NAMESPACE = uuid.UUID("6f1d6b0e-6a3d-5c55-9a3c-7f3b8f1c2a10")


def bucket_of(run_id: str) -> int:
    """The bucket (0 to 63) of a run."""
    return zlib.crc32(run_id.encode()) % BUCKETS


def buckets_of_shard(shard: int, shards: int) -> list[int]:
    """The buckets that a shard owns when there are ``shards`` of them."""
    return [bucket for bucket in range(BUCKETS) if bucket % shards == shard]


def task_run_id(run_id: str, task: str) -> str:
    return f"{run_id}.{task}"


def run_of(task_run_or_lease_id: str) -> str:
    """The run id inside a task run id or a lease id (a run id is returned as it is)."""
    return task_run_or_lease_id.partition(".")[0]


def task_of(task_run: str) -> str:
    """The task name inside a task run id."""
    return task_run.partition(".")[2]


def lease_id(task_run: str, invocation: int) -> str:
    return f"{task_run}@{invocation}"


def task_run_of(lease: str) -> str:
    """The task run id inside a lease id."""
    return lease.rpartition("@")[0]


def child_run_id(
    parent_task_run: str, *, child_key: str | None = None, operation_id: str | None = None, index: int | None = None
) -> str:
    """The run id of a child. The same parent and key always give the same child.

    A child is named by the user's ``child_key`` where there is one, else by the ``operation_id`` of a durable task or
    by the ``index`` among the children of an ordinary task.
    """
    if child_key is not None:
        key = f"key:{child_key}"
    elif operation_id is not None:
        key = f"node:{operation_id}"  # part of stored ids: it must not change
    else:
        key = f"index:{index}"
    return str(uuid.uuid5(_NAMESPACE, f"child\0{parent_task_run}\0{key}"))


def triggered_run_id(event_id: str, workflow: str, filter_key: str = "") -> str:
    """The run id of a run that an event starts: one run per event, workflow and filter."""
    return str(uuid.uuid5(_NAMESPACE, f"trigger\0{event_id}\0{workflow}\0{filter_key}"))


def wait_id(task_run: str, wait_key: str, condition: str) -> str:
    """The id of a timer or subscription: one for each task run, wait key and condition."""
    return f"{task_run}#{wait_key}#{condition}"


def wait_key(operation_id: str, replays: int) -> str:
    """Names a wait of a task: an operation id (or ``dag``, ``retry``), and how often the task had been replayed.

    A wait that was withdrawn is so never set again under the same id: a message that comes twice or late cannot undo
    the effect of a later one.
    """
    return f"{operation_id}@{replays}" if replays else operation_id


def operation_id_of(wait_key: str) -> str:
    """The operation id in a `wait_key`."""
    return wait_key.partition("@")[0]
