"""Tickets under which leases run. Follows from the runs, except for the use of a ticket."""

from __future__ import annotations

from typing import NamedTuple

from sublet_engine.run.state import Lease
from sublet_protocol import limits


class TicketUse(NamedTuple):
    """``grants`` under a ticket so far, and ``since``: the time of the first one (Unix seconds)."""

    grants: int
    since: float

    def exhausted(self, now: float) -> bool:
        """The ticket must be acknowledged, so that other shards can use the slot."""
        return self.grants >= limits.TICKET_REUSE_MAX or now - self.since > limits.TICKET_REUSED_MAX_S

    def next(self) -> TicketUse:
        return TicketUse(self.grants + 1, self.since)


class HeldTickets:
    """The task run and the use of each ticket that a lease holds."""

    def __init__(self) -> None:
        self._task_run_of: dict[str, str] = {}
        self._uses: dict[str, TicketUse] = {}

    def lease_began(self, task_run: str, lease: Lease) -> None:
        if lease.ticket:
            self._task_run_of[lease.ticket] = task_run

    def lease_ended(self, task_run: str, lease: Lease) -> None:
        if lease.ticket and self._task_run_of.get(lease.ticket) == task_run:
            del self._task_run_of[lease.ticket]
            self._uses.pop(lease.ticket, None)

    def task_run_of(self, ticket: str) -> str | None:
        """The task run that runs under this ticket."""
        return self._task_run_of.get(ticket)

    def task_runs(self) -> dict[str, str]:
        """The task runs by ticket."""
        return dict(self._task_run_of)

    def counted(self) -> set[str]:
        """Tickets whose use is counted."""
        return set(self._uses)

    def use_of(self, lease: Lease) -> TicketUse:
        """How often the lease's ticket has been used, counted since the last takeover of the shard."""
        return self._uses.get(lease.ticket, TicketUse(1, lease.granted_at))

    def used(self, ticket: str, use: TicketUse) -> None:
        self._uses[ticket] = use
