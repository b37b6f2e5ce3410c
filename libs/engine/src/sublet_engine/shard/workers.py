"""The workers as one shard sees them: which are live, what each pool can run, how many slots it has."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from sublet_protocol import limits
from sublet_protocol.specs import SlotKind


@dataclass(slots=True)
class Worker:
    id: str
    pool: str
    inbox: str
    last_seen: float
    """When its last message came (Unix seconds). -inf: none has come yet."""
    slots: dict[SlotKind, int] = field(default_factory=dict)
    taken: dict[SlotKind, int] = field(default_factory=dict)
    """Slots in use, by tasks of any shard, according to its last heartbeat."""
    leases: set[str] = field(default_factory=set)
    """Ids of the task runs of this shard that it holds a lease for."""
    draining: bool = False
    name: str = ""
    started_at: float = 0.0
    saved_at: float = 0.0
    silent_not_before: float = -math.inf
    """Silence is measured from this time at the earliest (Unix seconds)."""
    listed: frozenset[str] = frozenset()
    """The leases in its last heartbeat."""
    unlisted: dict[str, float] = field(default_factory=dict)
    """Leases of this shard that its heartbeats do not list, and since when (Unix seconds). The first such heartbeat may
    have been sent before the grant arrived."""
    suspected_at: float | None = None
    """When one of its tickets was redelivered to another worker (Unix seconds). Any message of the worker resets it."""

    def seen(self, now: float) -> None:
        self.last_seen = now
        self.suspected_at = None

    def reset_silence(self, now: float) -> None:
        """Measure its silence from now on."""
        self.silent_not_before = now
        self.suspected_at = None

    def live(self, now: float) -> bool:
        return now - self.silent_since <= limits.WORKER_SILENT_S and not self.draining

    def lost(self, now: float) -> bool:
        suspected = self.suspected_at is not None and now - self.suspected_at > limits.RECLAIM_GRACE_S
        return suspected or now - self.silent_since > limits.WORKER_LOST_S

    @property
    def silent_since(self) -> float:
        """When its last message came, or the later time from which silence is measured (Unix seconds)."""
        return max(self.last_seen, self.silent_not_before)


class Workers:
    def __init__(self) -> None:
        self._by_id: dict[str, Worker] = {}
        self._by_pool: dict[str, dict[str, Worker]] = defaultdict(dict)
        self._pools_of: dict[str, dict[str, float]] = defaultdict(dict)
        self._actions: dict[str, tuple[str, ...]] = {}

    def __iter__(self) -> Iterator[Worker]:
        return iter(self._by_id.values())

    def get(self, worker_id: str) -> Worker | None:
        return self._by_id.get(worker_id)

    def add(self, worker_id: str, pool: str, inbox: str, now: float) -> Worker:
        """The worker with this id, added if it is unknown. It has just sent a message."""
        worker = self.get_or_add(worker_id, pool, inbox, now)
        worker.inbox = inbox
        worker.seen(now)
        return worker

    def get_or_add(self, worker_id: str, pool: str, inbox: str, now: float) -> Worker:
        """The worker with this id, added if it is unknown. The silence of a new one is measured from now on."""
        worker = self._by_id.get(worker_id)
        if worker is None:
            worker = self._by_id[worker_id] = Worker(worker_id, pool, inbox, last_seen=-math.inf, silent_not_before=now)
            self._by_pool[pool][worker_id] = worker
        return worker

    def remove(self, worker_id: str) -> None:
        worker = self._by_id.pop(worker_id, None)
        if worker is not None:
            self._by_pool[worker.pool].pop(worker_id, None)

    def reset_silence(self, now: float) -> None:
        """Measure the silence of every worker from now on, because no message could arrive before."""
        for worker in self:
            worker.reset_silence(now)

    def drop_lease(self, worker_id: str, task_run: str) -> None:
        worker = self._by_id.get(worker_id)
        if worker is not None:
            worker.leases.discard(task_run)

    def lost(self, now: float) -> list[Worker]:
        return [worker for worker in self if worker.lost(now)]

    # --- pools ------------------------------------------------------------------------------------------------

    def offer(self, pool: str, actions: Iterable[str], at: float) -> None:
        """This pool can run these actions (``<workflow>:<task>``). ``at``: when its worker started (Unix seconds)."""
        self._actions[pool] = tuple(actions)
        for action in actions:
            self._pools_of[action][pool] = max(at, self._pools_of[action].get(pool, 0.0))

    def known(self, pool: str) -> bool:
        return pool in self._actions

    def actions(self, pool: str) -> tuple[str, ...]:
        return self._actions.get(pool, ())

    def alive(self, pool: str, now: float) -> bool:
        return any(worker.live(now) for worker in self._by_pool[pool].values())

    def pool_for(self, action: str, now: float) -> str | None:
        """The pool that should run an action: the latest registered one that has a live worker, else the latest one."""
        pools = self._pools_of.get(action)
        if not pools:
            return None
        if len(pools) == 1:
            return next(iter(pools))
        return max(pools, key=lambda pool: (self.alive(pool, now), pools[pool]))

    def capacity(self, pool: str, kind: SlotKind, now: float) -> int:
        """Slots of this kind of the pool's live workers."""
        return sum(worker.slots.get(kind, 1) for worker in self._by_pool[pool].values() if worker.live(now))

    def room(self, pool: str, kind: SlotKind, now: float) -> int:
        """Free slots of this kind of the pool's live workers, according to their last heartbeats."""
        taken = sum(worker.taken.get(kind, 0) for worker in self._by_pool[pool].values() if worker.live(now))
        return max(self.capacity(pool, kind, now) - taken, 0)

    @property
    def pools(self) -> Iterable[str]:
        return self._actions
