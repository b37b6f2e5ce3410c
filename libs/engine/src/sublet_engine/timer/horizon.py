"""The timers that are due next, in memory; the store may hold any number of later ones."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar, assert_never

from sublet_protocol.messages import CancelTimer, SetTimer


class Timer(Protocol):
    """``due`` in Unix seconds."""

    @property
    def id(self) -> str: ...
    @property
    def due(self) -> float: ...


AnyTimer = TypeVar("AnyTimer", bound=Timer)


class Horizon(Generic[AnyTimer]):
    """Every stored timer that is due before ``until`` (Unix seconds) is in memory; later ones are only in the store.

    So memory is bounded by ``capacity`` (up to twice that between two trims), however many timers are stored. At
    ``until`` the next page must be loaded from the store.
    """

    def __init__(self, capacity: int) -> None:
        self.until = -math.inf
        self._capacity = capacity
        self._timers: dict[str, AnyTimer] = {}
        self._heap: list[tuple[float, str]] = []
        """(due, id), including timers that have been removed meanwhile."""

    def __len__(self) -> int:
        return len(self._timers)

    def __contains__(self, timer_id: str) -> bool:
        return timer_id in self._timers

    def forget(self) -> None:
        """Start with an empty horizon, because another process may have changed the store."""
        self.until = -math.inf
        self._timers.clear()
        self._heap.clear()

    def extend(self, page: Sequence[AnyTimer], until: float, limit: int) -> list[AnyTimer]:
        """Add a page from the store: its earliest timers due up to ``until``, at most ``limit`` of them.

        Returns the timers that were due before the old horizon and so should have been in memory already.
        """
        strays = [timer for timer in page if timer.due < self.until and timer.id not in self._timers]
        # A full page may have left out timers with the same due time as its last one.
        self.until = max(self.until, page[-1].due if len(page) >= limit else until)
        for timer in page:
            self._push(timer)
        return strays

    def add(self, timers: Iterable[AnyTimer]) -> None:
        """Add new timers, already stored. Those due after the horizon are ignored; known ones do not change."""
        for timer in timers:
            if timer.due < self.until:
                self._push(timer)
        if len(self._timers) > 2 * self._capacity:
            self._trim()

    def remove(self, timer_ids: Iterable[str]) -> None:
        for timer_id in timer_ids:
            self._timers.pop(timer_id, None)

    def take_due(self, now: float, limit: int) -> list[AnyTimer]:
        """Take out the timers that are due at ``now``, earliest first, at most ``limit``."""
        due: list[AnyTimer] = []
        while len(due) < limit and (first := self._first()) is not None and first.due <= now:
            heapq.heappop(self._heap)
            due.append(self._timers.pop(first.id))
        return due

    def return_unfired(self, timers: Iterable[AnyTimer]) -> None:
        """Timers that were taken and could not be fired."""
        for timer in timers:
            self._push(timer)

    def next_at(self) -> float:
        """When the first timer is due or the next page must be loaded (Unix seconds)."""
        first = self._first()
        return self.until if first is None else min(first.due, self.until)

    def _first(self) -> AnyTimer | None:
        while self._heap:
            due, timer_id = self._heap[0]
            timer = self._timers.get(timer_id)
            if timer is not None and timer.due == due:
                return timer
            heapq.heappop(self._heap)
        return None

    def _push(self, timer: AnyTimer) -> None:
        if timer.id not in self._timers:
            self._timers[timer.id] = timer
            heapq.heappush(self._heap, (timer.due, timer.id))

    def _trim(self) -> None:
        """Drop the later timers from memory; they are in the store."""
        earliest = heapq.nsmallest(self._capacity, self._timers.values(), key=lambda timer: (timer.due, timer.id))
        self.until = min(self.until, earliest[-1].due)
        self._timers = {timer.id: timer for timer in earliest}
        self._heap = [(timer.due, timer.id) for timer in earliest]


@dataclass(frozen=True, slots=True)
class Changes:
    """Timers to set and ids of timers to cancel. No id is in both."""

    set: tuple[SetTimer, ...]
    cancel: tuple[str, ...]


def plan(messages: Iterable[SetTimer | CancelTimer]) -> Changes:
    """The net effect of messages in their order."""
    to_set: dict[str, SetTimer] = {}
    cancelled: dict[str, None] = {}
    for message in messages:
        match message:
            case SetTimer():
                cancelled.pop(message.id, None)
                to_set.setdefault(message.id, message)
            case CancelTimer():
                to_set.pop(message.id, None)
                cancelled[message.id] = None
            case _:
                assert_never(message)
    return Changes(tuple(to_set.values()), tuple(cancelled))
