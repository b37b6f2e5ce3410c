"""What the services need of the world: a broker, a store, a clock. Each has two adapters: real and in memory."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from sublet_engine.run.state import LogRecord, Run, TaskRun
from sublet_protocol.messages import Subscribe
from sublet_protocol.specs import EventFilter, WorkflowSpec


class StoreUnavailable(Exception):
    """The database did not answer, or not in time. Nothing is known about the write: repeat it, or start afresh."""


class RevisionConflict(Exception):
    """Another writer has changed a run since it was loaded: this process does not own the shard any more."""


class BrokerUnavailable(Exception):
    """The broker did not confirm a publish. It may or may not have arrived: publish again."""


# --- clock ----------------------------------------------------------------------------------------------------


class Clock(Protocol):
    def now(self) -> float:
        """Epoch seconds."""


# --- broker ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class Delivery:
    """A message that was delivered and is not acknowledged yet."""

    body: bytes
    exchange: str
    routing_key: str
    redelivered: bool
    message_id: str | None
    headers: Mapping[str, object]
    channel: Hashable
    """The channel it came on: once the broker closes it, this delivery is void (and will come again)."""
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
        """No new deliveries; what is unacknowledged goes back to the queue before anybody else is served."""


Handler = Callable[[Delivery], None]
"""Called in order of delivery; must return at once (it hands over to a batch loop)."""


class Broker(Protocol):
    """AMQP. Methods raise BrokerUnavailable where the broker cannot be reached; the adapter reconnects by itself."""

    async def consume(self, queue: str, handler: Handler, *, prefetch: int) -> Consumer:
        """Start consuming a queue of the topology. Restored by itself after a reconnect (with another channel)."""

    async def open_inbox(self, name: str, handler: Handler, *, key: str | None = None) -> Consumer:
        """Declare an exclusive, transient queue bound to ``sublet.inboxes`` (under its own name, if no ``key`` is
        given), and consume it without acknowledgements."""

    def ack(self, deliveries: Sequence[Delivery]) -> None:
        """Acknowledge; void ones are ignored. A contiguous prefix of one channel costs one frame."""

    def requeue(self, deliveries: Sequence[Delivery]) -> None:
        """Give back for redelivery. Void ones are ignored."""

    def is_void(self, delivery: Delivery) -> bool:
        """Its channel is gone: it can no longer be acknowledged, and comes again."""

    async def publish(self, messages: Sequence[Outgoing]) -> None:
        """Returns when the broker has confirmed all of them; raises BrokerUnavailable when one was not."""

    def publish_nowait(self, messages: Sequence[Outgoing]) -> None:
        """Hints (tickets, ticks): sent without waiting; a loss is only logged."""

    @property
    def connected(self) -> bool: ...

    async def close(self) -> None: ...


# --- store ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RunChange:
    """A run to commit. ``before`` None: it is new. ``after.revision`` is ``before.revision + 1`` (1 for a new one)."""

    before: Run | None
    after: Run


@dataclass(frozen=True, slots=True)
class RunFilter:
    """What ``runs.list`` can ask for. Times in epoch seconds."""

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
    """A worker as people and later owners see it; ``actions`` are ``<workflow>:<task>`` that its pool can run."""

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
"""A worker that left can be looked up for a day."""


class RunStore(Protocol):
    """Owned by the scheduler: ``runs``, ``durable_log``, ``workflows``, ``workers``.

    Every method raises StoreUnavailable where the database does not answer. Writes are majority and journaled.
    """

    async def load_runs(self, run_ids: Sequence[str]) -> list[Run]: ...

    async def load_waits(self, run_ids: Sequence[str]) -> Mapping[str, Sequence[TaskRun]]:
        """Of each run that is there its tasks, with nothing but what says whether they wait, and for what: name,
        status, replays, met and open waits."""

    def load_live(self, buckets: Sequence[int]) -> AsyncIterator[list[Run]]:
        """All runs of these buckets of which something is ready or running, in chunks, oldest first."""

    async def count_waiting(self, buckets: Sequence[int]) -> Mapping[str, int]:
        """How many task runs of these buckets wait without a slot, by `counters.waiting_reason`."""

    async def append_log(self, records: Sequence[LogRecord]) -> None:
        """One unordered bulk insert. A record that is there already (same id) is left as it is."""

    async def load_logs(self, task_run_ids: Sequence[str]) -> list[LogRecord]:
        """All records of these task runs, leftovers included, ordered by task run and seq."""

    async def commit(self, changes: Sequence[RunChange]) -> None:
        """One bulk write; each update is conditional on the revision, each new run on its absence.

        Raises:
            RevisionConflict: at least one condition failed (others may have been written).
        """

    async def save_workflow(self, spec: WorkflowSpec, registered_at: float) -> None: ...

    async def load_workflows(self) -> list[WorkflowRecord]: ...

    async def save_worker(self, worker: WorkerRecord) -> None: ...

    async def load_workers(self) -> list[WorkerRecord]:
        """Those not gone, and those gone for less than a day."""

    async def beat(self, scheduler: str, now: float) -> Mapping[str, float]:
        """Say that a scheduler process lives; returns when each was last heard of (those of the last minute)."""

    async def list_runs(self, query: RunFilter) -> list[Run]:
        """Newest first."""


class SettingsStore(Protocol):
    """Settings of a deployment that never change: ``settings``. Shared by all services, written by the first one."""

    async def claim(self, settings: Mapping[str, int | str]) -> Mapping[str, int | str]:
        """Write these settings unless there are some; returns the stored ones. Raises StoreUnavailable."""


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
        """One unordered bulk. An upsert of an id that is there changes nothing. No id stands in both lists."""

    async def due_timers(self, until: float, limit: int) -> list[StoredTimer]:
        """The earliest timers with ``due <= until``, in order of ``due``."""

    async def count_timers(self) -> int:
        """About how many there are, for people."""


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
    """A wait for an event. ``match_key`` is what an event is looked up by: see `sublet_engine.event.matching`."""

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
        """One unordered bulk insert; returns the ids that were there already."""

    async def get_events(self, ids: Sequence[str]) -> list[StoredEvent]: ...

    async def last_seq(self) -> int:
        """The highest seq stored or passed by, or 0."""

    async def advance_past(self, seq: int) -> None:
        """Remember that no event may get this seq any more, nor one below it."""

    async def events_after(self, after: Mapping[str, int], limit: int) -> list[StoredEvent]:
        """The earliest events whose key is in ``after`` and whose seq is greater than the one given for that key.

        In order of seq over all keys; one query, whatever the number of keys.
        """

    async def change_subscriptions(self, upserts: Sequence[StoredSubscription], deletes: Sequence[str]) -> None: ...

    async def find_subscriptions(self, match_keys: Sequence[str]) -> list[StoredSubscription]:
        """One query, whatever the number of keys."""

    async def subscriptions_after(self, subscription_id: str, limit: int) -> list[StoredSubscription]:
        """Those with the next greater ids, in the order of their ids."""

    async def count_subscriptions(self) -> int:
        """About how many there are, for people."""

    async def save_field_sets(self, field_sets: Mapping[str, Sequence[tuple[str, ...]]]) -> None:
        """Add, to each event key, lists of payload paths whose values take part in match keys."""

    async def load_field_sets(self, event_keys: Sequence[str]) -> Mapping[str, Sequence[tuple[str, ...]]]: ...

    async def save_trigger(self, trigger: TriggerRecord, at: float) -> None:
        """Replaces the workflow's triggers, unless those stored are newer than ``at``."""

    async def load_triggers(self) -> list[TriggerRecord]: ...

    async def list_events(self, key: str | None, since: float | None, limit: int) -> list[StoredEvent]: ...


Process = Callable[[list[Delivery]], Awaitable[None]]
"""Handles a batch whole: commits and publishes. Raises StoreUnavailable, BrokerUnavailable or RevisionConflict."""
