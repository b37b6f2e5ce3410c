"""Checks tickets: a worker acknowledges one only after the broker has the reports about each lease granted under it."""

from __future__ import annotations

from typing import NamedTuple

from simulation.checkers.history import ReportViolation
from simulation.system.processes import Process
from sublet_platform.memory.cluster import Subscription
from sublet_protocol.messages import Evicted, Failed, Finished, GrantDeclined, SlotReleased


class Delivery(NamedTuple):
    """One delivery of a ticket."""

    channel: Subscription
    tag: int
    redelivered: bool


Report = Finished | Failed | Evicted | SlotReleased | GrantDeclined


class SlotWatch:
    def __init__(self, report_violation: ReportViolation) -> None:
        self._report_violation = report_violation
        self._reported: set[str] = set()
        """Leases whose end or release has reached the broker."""
        self._revoked: set[str] = set()
        """Leases whose worker has received that they are revoked. Their code may stop, which frees the ticket, or run
        for a while longer."""
        self._delivered: dict[tuple[Process, str], Delivery] = {}
        self._claimed: dict[tuple[Process, str], Delivery] = {}
        self._leases: dict[Delivery, list[str]] = {}
        self._granted: set[tuple[Process, str]] = set()
        self._suspects: dict[str, str] = {}
        """Leases whose ticket was acknowledged too early, unless it turns out that their code never started."""

    def delivered(self, process: Process, ticket: str, delivery: Delivery) -> None:
        self._delivered[process, ticket] = delivery

    def claimed(self, process: Process, ticket: str, redelivered: bool) -> None:
        """A ticket that is not claimed belongs to a running task whose own ticket was lost. (A claim from before the
        connection broke may be sent after the ticket has been redelivered.)"""
        delivery = self._delivered.get((process, ticket))
        if delivery is not None and delivery.redelivered == redelivered:
            self._claimed[process, ticket] = delivery

    def no_task(self, process: Process, ticket: str) -> None:
        self._claimed.pop((process, ticket), None)

    def granted(self, process: Process, ticket: str, lease: str) -> None:
        if (process, lease) in self._granted:
            return  # it runs already, under another ticket
        self._granted.add((process, lease))
        delivery = self._claimed.get((process, ticket))
        if delivery is not None and delivery.channel.open:
            leases = self._leases.setdefault(delivery, [])
            if all(earlier in self._reported for earlier in leases):
                leases.append(lease)

    def reported(self, report: Report) -> None:
        suspicion = self._suspects.pop(report.lease, None)
        if suspicion is not None and not isinstance(report, GrantDeclined):
            self._report_violation(suspicion)
        self._reported.add(report.lease)

    def revoked(self, lease: str) -> None:
        self._revoked.add(lease)

    def acknowledged(self, process: Process, delivery: Delivery) -> None:
        for lease in self._leases.get(delivery, ()):
            if lease not in self._reported and lease not in self._revoked:
                self._suspects[lease] = f"{process.name} acknowledged its ticket before it reported the end of {lease}"
