"""The tickets of a worker. RabbitMQ counts each unacknowledged ticket as a taken slot of this worker."""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict, deque
from collections.abc import Callable, Hashable
from contextvars import Context

from sublet._amqp.transport import TicketDelivery, Transport
from sublet_protocol.backoff import Backoff
from sublet_protocol.messages import Claim, MalformedMessage, Record, Ticket, decode_ticket, encode
from sublet_protocol.specs import SlotKind
from sublet_protocol.topology import INBOXES

CLAIM_REPEATED_S = 3.0
"""Seconds without an answer after which a claim is repeated, to the queue of the shard: a scheduler that took the shard
over in the meantime has not seen the claim. The pause doubles up to `CLAIM_REPEATED_MAX_S`."""

CLAIM_REPEATED_MAX_S = 30.0
"""The longest pause in seconds between repeated claims: an outage of the scheduler must not fill its queue."""

logger = logging.getLogger(__name__)


class HeldTicket:
    """A ticket that was delivered to this worker.

    Attributes:
        serving: a task runs under this ticket.
        asked: its claim has no answer yet.
        dismissed: the scheduler answered "no task" before RabbitMQ confirmed the last report under this ticket.
        ask_again_at: when the claim is repeated, in seconds of the event loop's time.
        void: its channel is closed, so RabbitMQ delivers the ticket again, to any worker.
    """

    __slots__ = (
        "ask_again_at",
        "asked",
        "backoff",
        "claim_key",
        "delivery",
        "dismissed",
        "id",
        "kind",
        "serving",
        "shard_key",
        "void",
    )

    def __init__(self, ticket: Ticket, kind: SlotKind, delivery: TicketDelivery) -> None:
        self.id = ticket.id
        self.claim_key = ticket.claim_key
        self.shard_key = ticket.shard_key
        self.kind = kind
        self.delivery = delivery
        self.serving = False
        self.asked = False
        self.dismissed = False
        self.ask_again_at = 0.0
        self.backoff = Backoff(CLAIM_REPEATED_S, CLAIM_REPEATED_MAX_S)
        self.void = False


class Tickets:
    """Claims delivered tickets, uses them for the next task too, and acknowledges them when there is no task.

    When a connection is lost, its tickets become void, but their tasks continue as *orphans*. Each orphan *adopts* the
    next ticket of its kind: the ticket is held without a claim until the orphan ends. So RabbitMQ never counts fewer
    taken slots than there are running tasks.
    """

    def __init__(
        self,
        transport: Transport,
        claim: Callable[[HeldTicket], Claim],
        report: Callable[[str, Record], object],
    ) -> None:
        self._transport = transport
        self._claim = claim
        self._report = report
        self._loop = asyncio.get_running_loop()
        self._held: dict[str, HeldTicket] = {}
        self._adopted: dict[SlotKind, deque[HeldTicket]] = {"task": deque(), "durable": deque()}
        self._orphans: dict[SlotKind, int] = {"task": 0, "durable": 0}
        """Number of tasks that run without a ticket and have not adopted one yet."""
        self._channels: dict[SlotKind, Hashable] = {}
        self._changed: set[SlotKind] = set()
        self._unsent: dict[str, list[Record]] = defaultdict(list)
        self.draining = False

    @property
    def unanswered(self) -> int:
        """Number of tickets whose claim has no answer yet."""
        return sum(ticket.asked for ticket in self._held.values())

    def idle(self, kind: SlotKind) -> int:
        """Number of tickets of this kind without a running task. A task may be granted to each of them at any time."""
        return sum(ticket.kind == kind and not ticket.serving for ticket in self._held.values())

    # --- arriving messages -----------------------------------------------------------------------------------------

    def delivered(self, kind: SlotKind, delivery: TicketDelivery) -> None:
        """RabbitMQ has delivered a ticket."""
        if self._channels.get(kind) not in (None, delivery.channel):
            self._void(kind)
            self._changed.add(kind)
        self._channels[kind] = delivery.channel
        try:
            ticket = HeldTicket(decode_ticket(delivery.body), kind, delivery)
        except MalformedMessage as error:
            logger.error("cannot read a ticket, dropping it: %s", error)
            self._transport.ack(delivery)
            return
        if ticket.id in self._held:
            self._transport.ack(delivery)  # a duplicate of a ticket that is claimed already
        elif self.draining:
            self._transport.requeue(delivery)
        elif self._orphans[kind]:
            self._orphans[kind] -= 1
            self._adopted[kind].append(ticket)
        else:
            self._ask(ticket)

    def reconnected(self) -> None:
        """Mark the tickets of the old connection as void. Tickets of the new one may have arrived before this call."""
        for kind in list(self._channels):
            if kind in self._changed:
                self._changed.discard(kind)
            else:
                self._void(kind)
                del self._channels[kind]

    def serve(self, ticket_id: str) -> HeldTicket | None:
        """Use a ticket for a granted task. None: this worker does not hold the ticket any more, or it is in use."""
        ticket = self._held.get(ticket_id)
        if ticket is None or ticket.serving:
            return None
        ticket.serving = True
        ticket.asked = ticket.dismissed = False
        return ticket

    def no_task(self, ticket_id: str) -> None:
        """The scheduler has no task for this ticket."""
        ticket = self._held.get(ticket_id)
        if ticket is None or ticket.serving:
            return
        if ticket.asked:
            self.acknowledge(ticket)
        else:
            ticket.dismissed = True

    # --- ends of tasks ---------------------------------------------------------------------------------------------

    def orphan_started(self, kind: SlotKind) -> None:
        """A task without a ticket has started."""
        self._orphans[kind] += 1

    def can_retain(self, ticket: HeldTicket | None) -> bool:
        """Whether the ticket can be retained: the report of an end then asks for the next task under it."""
        return ticket is not None and not ticket.void and not self.draining

    def wait_for_next(self, ticket: HeldTicket) -> None:
        """The task has ended, and its report asks for the next one. Call `expect` when the report is confirmed."""
        ticket.serving = False

    def expect(self, ticket: HeldTicket) -> None:
        """The report is confirmed, so the scheduler will answer, unless it has answered already."""
        if ticket.serving or self._held.get(ticket.id) is not ticket:
            return
        if ticket.dismissed:
            self.acknowledge(ticket)
        else:
            self._await_answer(ticket)

    def acknowledge(self, ticket: HeldTicket) -> None:
        """Acknowledge the ticket, which frees the slot. For a task whose ticket is void, see `orphan_ended`."""
        if self._held.get(ticket.id) is ticket:
            del self._held[ticket.id]
        if not ticket.void:
            self._transport.ack(ticket.delivery)

    def requeue(self, ticket: HeldTicket) -> None:
        """Requeue the ticket, for any worker."""
        if self._held.get(ticket.id) is ticket:
            del self._held[ticket.id]
        if not ticket.void:
            self._transport.requeue(ticket.delivery)

    def orphan_ended(self, kind: SlotKind) -> None:
        """A task without a ticket has ended: claim the ticket that it adopted."""
        if not self._adopted[kind]:
            self._orphans[kind] -= 1
        elif self.draining:
            self._transport.requeue(self._adopted[kind].popleft().delivery)
        else:
            self._ask(self._adopted[kind].popleft())

    def drain(self) -> None:
        """Claim no more tickets. Answers to earlier claims are still used."""
        self.draining = True

    def requeue_all(self) -> None:
        """Requeue all tickets without a task, at the end of the worker."""
        for ticket in list(self._held.values()):
            if not ticket.serving:
                self.requeue(ticket)
        for adopted in self._adopted.values():
            while adopted:
                self._transport.requeue(adopted.popleft().delivery)

    # --- claims ----------------------------------------------------------------------------------------------------

    def ask_again(self) -> None:
        """Repeat claims without an answer, to the queue of the shard: another scheduler may own the shard now."""
        now = self._loop.time()
        for ticket in self._held.values():
            if ticket.asked and ticket.ask_again_at <= now:
                ticket.ask_again_at = now + ticket.backoff.next_s()
                self._report(ticket.shard_key, self._claim(ticket))

    def _ask(self, ticket: HeldTicket) -> None:
        self._held[ticket.id] = ticket
        self._await_answer(ticket)
        if not self._unsent:
            self._loop.call_soon(self._send_claims, context=Context())
        self._unsent[ticket.claim_key].append(self._claim(ticket))

    def _await_answer(self, ticket: HeldTicket) -> None:
        ticket.asked = True
        ticket.backoff.reset()
        ticket.ask_again_at = self._loop.time() + ticket.backoff.next_s()

    def _send_claims(self) -> None:
        unsent, self._unsent = self._unsent, defaultdict(list)
        for claim_key, claims in unsent.items():
            self._transport.publish_nowait(INBOXES, claim_key, encode(claims))

    # --- lost connections ------------------------------------------------------------------------------------------

    def _void(self, kind: SlotKind) -> None:
        """The channel is closed: RabbitMQ delivers all of its tickets again."""
        for ticket in [ticket for ticket in self._held.values() if ticket.kind == kind]:
            ticket.void = True
            del self._held[ticket.id]
            if ticket.serving:
                self._orphans[kind] += 1
        self._orphans[kind] += len(self._adopted[kind])
        self._adopted[kind].clear()
