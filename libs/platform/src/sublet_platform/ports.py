"""The ports of the services: broker, stores and clock. Each has two adapters: a real one and one in memory."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from sublet_engine.run.state import LogRecord, Run, TaskRun
from sublet_protocol.messages import Subscribe
from sublet_protocol.specs import EventFilter, WorkflowSpec


class StoreUnavailable(Exception):
    """The database did not answer in time. A write may have succeeded or not: repeat it, or reload the state."""


class RevisionConflict(Exception):
    """Another writer has changed a run since it was loaded. This process does not own the shard any more."""


class BrokerUnavailable(Exception):
    """The broker did not confirm a publish. The message may have arrived: publish it again."""


# --- clock ----------------------------------------------------------------------------------------------------


class Clock(Protocol):
    def now(self) -> float:
        """The time in Unix seconds."""


# --- broker ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class Delivery:
    """A delivered message."""

    body: bytes
    exchange: str
    routing_key: str
    redelivered: bool
    message_id: str | None
    headers: Mapping[str, object]
    channel: Hashable
    """The channel of the delivery. Once it is closed, the delivery is void, and the message is redelivered."""
    tag: int
    needs_ack: bool = True
    """False: it came through an inbox, which is consumed without acknowledgements."""


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A message to publish. ``exchange`` "" is the default exchange (routing key = queue)."""

    exchange: str
    routing_key: str
    body: bytes
    persistent: bool = True
    message_id: str | None = None
    headers: Mapping[str, object] = field(default_factory=dict)


class Consumer(Protocol):
    async def close(self) -> None:
        """Stop deliveries. Unacknowledged messages are requeued before another consumer is served."""


Handler = Callable[[Delivery], None]
"""Called in the order of delivery. It must return at once (it passes the delivery to a batch loop)."""


class Broker(Protocol):
    """AMQP. Methods raise BrokerUnavailable if the broker cannot be reached. The adapter reconnects automatically."""

    async def consume(self, queue: str, handler: Handler, *, prefetch: int) -> Consumer:
        """Consume a queue of the topology. After a reconnect the consumer is restored, with another channel."""

    async def open_inbox(self, name: str, handler: Handler, *, key: str | None = None) -> Consumer:
        """Declare an exclusive, transient queue bound to ``sublet.inboxes`` (under its own name, if no ``key`` is
        given), and consume it without acknowledgements."""

    def ack(self, deliveries: Sequence[Delivery]) -> None:
        """Acknowledge deliveries. Void ones are ignored. A contiguous prefix of a channel costs one frame."""

    def requeue(self, deliveries: Sequence[Delivery]) -> None:
        """Requeue deliveries. Void ones are ignored."""

    def is_void(self, delivery: Delivery) -> bool:
        """The channel is closed: the delivery can no longer be acknowledged, and is redelivered."""

    async def publish(self, messages: Sequence[Outgoing]) -> None:
        """Publish, and wait until all messages are confirmed. Raises BrokerUnavailable if one is not."""

    def publish_nowait(self, messages: Sequence[Outgoing]) -> None:
        """Publish unconfirmed messages (tickets, ticks) without waiting. A loss is only logged."""

    @property
    def connected(self) -> bool: ...

    async def close(self) -> None: ...


# --- store ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RunChange:
    """A run to commit. ``before``: None for a new run. ``after.revision``: that of ``before`` plus 1, or 1."""

    before: Run | None
    after: Run


@dataclass(frozen=True, slots=True)
class RunFilter:
    """The filter of ``runs.list``. Times are Unix seconds."""

    since: float | None = None
    until: float | None = None
    statuses: tuple[str, ...] = ()
    workflows: tuple[str, ...] = ()
    metadata: Mapping[str, object] = field(default_factory=dict)
    parent_task_run_id: str | None = None
    event_id: str | None = None
    limit: int = 100
    offset: int = 0


@dataclass(frozen=True, slots=True)
class WorkflowRecord:
    """A stored definition. The current version of a workflow is the one with the latest ``registered_at``."""

    spec: WorkflowSpec
    registered_at: float


@dataclass(frozen=True, slots=True)
class WorkerRecord:
    """A worker, stored for people and for later owners. ``actions``: the ``<workflow>:<task>`` that its pool runs."""

    id: str
    pool: str
    name: str
    inbox: str
    slots: int
    durable_slots: int
    actions: tuple[str, ...]
    started_at: float
    last_seen_at: float
    gone: bool = False


GONE_WORKER_RETENTION_S = 86_400.0
"""How long a stopped worker is stored."""


class RunStore(Protocol):
    """Owned by the scheduler: ``runs``, ``durable_log``, ``workflows``, ``workers``.

    Every method raises StoreUnavailable if the database does not answer. Writes are journaled by a majority.
    """

    async def load_runs(self, run_ids: Sequence[str]) -> list[Run]: ...

    async def load_waits(self, run_ids: Sequence[str]) -> Mapping[str, Sequence[TaskRun]]:
        """The tasks of each existing run, with only the fields that describe their waits: name, status, replays, met
        and open waits."""

    def load_live(self, buckets: Sequence[int]) -> AsyncIterator[list[Run]]:
        """All runs of these buckets with a ready or running task, in chunks, oldest first."""

    async def count_waiting(self, buckets: Sequence[int]) -> Mapping[str, int]:
        """The number of task runs of these buckets that wait without a slot, by `counters.waiting_reason`."""

    async def append_log(self, records: Sequence[LogRecord]) -> None:
        """One unordered bulk insert. An existing record with the same id stays unchanged."""

    async def load_logs(self, task_run_ids: Sequence[str]) -> list[LogRecord]:
        """All records of these task runs, with leftovers, ordered by task run and seq."""

    async def commit(self, changes: Sequence[RunChange]) -> None:
        """One bulk write. Each update is conditional on the revision, each insert on the absence of the run.

        Raises:
            RevisionConflict: at least one condition failed (others may have been written).
        """

    async def save_workflow(self, spec: WorkflowSpec, registered_at: float) -> None: ...

    async def load_workflows(self) -> list[WorkflowRecord]: ...

    async def save_worker(self, worker: WorkerRecord) -> None: ...

    async def load_workers(self) -> list[WorkerRecord]:
        """Live workers, and workers that stopped less than a day ago."""

    async def beat(self, scheduler: str, now: float) -> Mapping[str, float]:
        """Store a heartbeat of a scheduler process. Returns the latest one of each scheduler in the last minute."""

    async def list_runs(self, query: RunFilter) -> list[Run]:
        """Newest first."""


class SettingsStore(Protocol):
    """Settings of a deployment that never change: ``settings``. Shared by all services, written by the first one."""

    async def claim(self, settings: Mapping[str, int | str]) -> Mapping[str, int | str]:
        """Write these settings unless settings exist. Returns the stored ones. Raises StoreUnavailable."""


@dataclass(frozen=True, slots=True)
class StoredTimer:
    id: str
    due: float
    task_run_id: str
    operation_id: str
    key: str


class TimerStore(Protocol):
    """Owned by the timer: ``timers``."""

    async def change_timers(self, upserts: Sequence[StoredTimer], deletes: Sequence[str]) -> None:
        """One unordered bulk write. An upsert of an existing id changes nothing. No id is in both lists."""

    async def due_timers(self, until: float, limit: int) -> list[StoredTimer]:
        """The earliest timers with ``due <= until``, in order of ``due``."""

    async def count_timers(self) -> int:
        """An estimate, for metrics."""


@dataclass(frozen=True, slots=True)
class StoredEvent:
    """An event. ``seq`` orders all events: microseconds since 1970 at its arrival, made unique and increasing."""

    id: str
    seq: int
    key: str
    payload: str
    scope: str | None
    metadata: Mapping[str, object]
    priority: int | None
    seen_at: float


@dataclass(frozen=True, slots=True)
class StoredSubscription:
    """A wait for an event. It is found by its ``match_key``: see `sublet_engine.event.matching`."""

    id: str
    match_key: str
    subscribe: Subscribe


@dataclass(frozen=True, slots=True)
class TriggerRecord:
    workflow: str
    on_events: tuple[str, ...]
    filters: tuple[EventFilter, ...]


class EventStore(Protocol):
    """Owned by event-ingest: ``events``, ``subscriptions``."""

    async def insert_events(self, events: Sequence[StoredEvent]) -> set[str]:
        """One unordered bulk insert. Returns the ids that existed already."""

    async def get_events(self, ids: Sequence[str]) -> list[StoredEvent]: ...

    async def last_seq(self) -> int:
        """The highest seq of a stored event or of `advance_past`, or 0."""

    async def advance_past(self, seq: int) -> None:
        """Store that no later event may get this seq or a lower one."""

    async def events_after(self, after: Mapping[str, int], limit: int) -> list[StoredEvent]:
        """The earliest events whose key is in ``after`` and whose seq is greater than the one given for that key.

        They are in order of seq over all keys. It is one query for any number of keys.
        """

    async def change_subscriptions(self, upserts: Sequence[StoredSubscription], deletes: Sequence[str]) -> None: ...

    async def find_subscriptions(self, match_keys: Sequence[str]) -> list[StoredSubscription]:
        """One query for any number of keys."""

    async def subscriptions_after(self, subscription_id: str, limit: int) -> list[StoredSubscription]:
        """The subscriptions with the next greater ids, in order."""

    async def count_subscriptions(self) -> int:
        """An estimate, for metrics."""

    async def save_field_sets(self, field_sets: Mapping[str, Sequence[tuple[str, ...]]]) -> None:
        """Add field sets to event keys: lists of payload paths whose values are part of match keys."""

    async def load_field_sets(self, event_keys: Sequence[str]) -> Mapping[str, Sequence[tuple[str, ...]]]: ...

    async def save_trigger(self, trigger: TriggerRecord, at: float) -> None:
        """Replace the triggers of the workflow, unless the stored ones are newer than ``at``."""

    async def load_triggers(self) -> list[TriggerRecord]: ...

    async def list_events(self, key: str | None, since: float | None, limit: int) -> list[StoredEvent]: ...


Process = Callable[[list[Delivery]], Awaitable[None]]
"""Handles a whole batch: commits and publishes. Raises StoreUnavailable, BrokerUnavailable or RevisionConflict."""
