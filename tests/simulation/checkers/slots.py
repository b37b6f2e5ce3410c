"""Watches tickets: a worker acknowledges one only when the broker knows how each lease under it has ended."""

from __future__ import annotations

from typing import NamedTuple

from simulation.checkers.history import Complain
from simulation.system.processes import Process
from sublet_platform.memory.cluster import Subscription
from sublet_protocol.messages import Evicted, Failed, Finished, GrantDeclined, SlotReleased


class Delivery(NamedTuple):
    """A ticket as it was delivered."""

    channel: Subscription
    tag: int
    redelivered: bool


Report = Finished | Failed | Evicted | SlotReleased | GrantDeclined


class SlotWatch:
    def __init__(self, complain: Complain) -> None:
        self._complain = complain
        self._told: set[str] = set()
        """Leases whose end, or release, the broker knows."""
        self._revoked: set[str] = set()
        """Leases whose worker knows that they are revoked: their code may stop, and free the ticket, or go on for a
        while. Then what is granted under the ticket meanwhile runs without it."""
        self._delivered: dict[tuple[Process, str], Delivery] = {}
        self._claimed: dict[tuple[Process, str], Delivery] = {}
        self._leases: dict[Delivery, list[str]] = {}
        self._granted: set[tuple[Process, str]] = set()
        self._suspects: dict[str, str] = {}
        """Leases whose ticket was acknowledged too early, unless it turns out that they were never begun."""

    def delivered(self, process: Process, ticket: str, delivery: Delivery) -> None:
        self._delivered[process, ticket] = delivery

    def claimed(self, process: Process, ticket: str, redelivered: bool) -> None:
        """A ticket that nobody claims only stands for a task that lost its own. (A claim from before the connection
        broke may be sent after the ticket has come again.)"""
        delivery = self._delivered.get((process, ticket))
        if delivery is not None and delivery.redelivered == redelivered:
            self._claimed[process, ticket] = delivery

    def no_task(self, process: Process, ticket: str) -> None:
        self._claimed.pop((process, ticket), None)

    def granted(self, process: Process, ticket: str, lease: str) -> None:
        if (process, lease) in self._granted:
            return  # it runs already, and another ticket stands for it
        self._granted.add((process, lease))
        delivery = self._claimed.get((process, ticket))
        if delivery is not None and delivery.channel.open:
            leases = self._leases.setdefault(delivery, [])
            if all(each in self._told for each in leases):
                leases.append(lease)

    def reported(self, report: Report) -> None:
        suspicion = self._suspects.pop(report.lease, None)
        if suspicion is not None and not isinstance(report, GrantDeclined):
            self._complain(suspicion)
        self._told.add(report.lease)

    def revoked(self, lease: str) -> None:
        self._revoked.add(lease)

    def acknowledged(self, process: Process, delivery: Delivery) -> None:
        for lease in self._leases.get(delivery, ()):
            if lease not in self._told and lease not in self._revoked:
                self._suspects[lease] = f"{process.name} acknowledged its ticket before it reported the end of {lease}"
