"""The tickets that a worker holds: each is a slot taken at RabbitMQ, and should be one taken here."""

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
    """A ticket of ours. ``void``: its channel is gone, the broker has given it to somebody again."""

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
        """A task runs under it."""
        self.asked = False
        """The scheduler owes an answer."""
        self.dismissed = False
        """It said that there is nothing to do, before the broker has confirmed the last report under this ticket."""
        self.ask_again_at = 0.0
        self.backoff = Backoff(CLAIM_REPEATED_S, CLAIM_REPEATED_MAX_S)
        self.void = False


class Tickets:
    """Claims what is delivered, keeps tickets for the next task, and gives them up when there is none.

    When a connection is lost its tickets are void although their tasks go on. Each such orphan *adopts* the next
    ticket of its kind: that is held, without claiming anything, until the orphan ends. So what RabbitMQ counts stays
    what is truly taken.
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
        """Tasks that run without a ticket and have not adopted one yet."""
        self._channels: dict[SlotKind, Hashable] = {}
        self._changed: set[SlotKind] = set()
        self._unsent: dict[str, list[Record]] = defaultdict(list)
        self.draining = False

    @property
    def unanswered(self) -> int:
        """Tickets for which an answer is due."""
        return sum(ticket.asked for ticket in self._held.values())

    def idle(self, kind: SlotKind) -> int:
        """Tickets of this kind under which nothing runs: each may be granted a task at any moment."""
        return sum(ticket.kind == kind and not ticket.serving for ticket in self._held.values())

    # --- what arrives ---------------------------------------------------------------------------------------------

    def delivered(self, kind: SlotKind, delivery: TicketDelivery) -> None:
        """RabbitMQ gave us a slot's worth of work."""
        if self._channels.get(kind) not in (None, delivery.channel):
            self._void(kind)
            self._changed.add(kind)
        self._channels[kind] = delivery.channel
        try:
            ticket = HeldTicket(decode_ticket(delivery.body), kind, delivery)
        except MalformedMessage as error:
            logger.error("a ticket could not be read and is dropped: %s", error)
            self._transport.ack(delivery)
            return
        if ticket.id in self._held:
            self._transport.ack(delivery)  # doubled: a hint that we follow already
        elif self.draining:
            self._transport.requeue(delivery)
        elif self._orphans[kind]:
            self._orphans[kind] -= 1
            self._adopted[kind].append(ticket)
        else:
            self._ask(ticket)

    def reconnected(self) -> None:
        """Tickets of the old connection are void. (Those of the new one may have come before this call.)"""
        for kind in list(self._channels):
            if kind in self._changed:
                self._changed.discard(kind)
            else:
                self._void(kind)
                del self._channels[kind]

    def serve(self, ticket_id: str) -> HeldTicket | None:
        """A grant came for this ticket; None if it is not ours any more."""
        ticket = self._held.get(ticket_id)
        if ticket is None or ticket.serving:
            return None
        ticket.serving = True
        ticket.asked = ticket.dismissed = False
        return ticket

    def no_task(self, ticket_id: str) -> None:
        ticket = self._held.get(ticket_id)
        if ticket is None or ticket.serving:
            return
        if ticket.asked:
            self.give_up(ticket)
        else:
            ticket.dismissed = True

    # --- what ends ------------------------------------------------------------------------------------------------

    def orphan_started(self, kind: SlotKind) -> None:
        """A task began for which there is no ticket."""
        self._orphans[kind] += 1

    def keeps(self, ticket: HeldTicket | None) -> bool:
        """Whether a report may ask for the next task under it."""
        return ticket is not None and not ticket.void and not self.draining

    def wait_for_next(self, ticket: HeldTicket) -> None:
        """The task under it has ended, and its report asks for the next one. Once that is confirmed see `expect`."""
        ticket.serving = False

    def expect(self, ticket: HeldTicket) -> None:
        """The scheduler has the question: from now on an answer is due (unless it has come already)."""
        if ticket.serving or self._held.get(ticket.id) is not ticket:
            return
        if ticket.dismissed:
            self.give_up(ticket)
        else:
            self._await_answer(ticket)

    def give_up(self, ticket: HeldTicket) -> None:
        """The slot is free: acknowledge. For a task whose ticket is void see `orphan_ended`."""
        if self._held.get(ticket.id) is ticket:
            del self._held[ticket.id]
        if not ticket.void:
            self._transport.ack(ticket.delivery)

    def requeue(self, ticket: HeldTicket) -> None:
        """Let another worker have it."""
        if self._held.get(ticket.id) is ticket:
            del self._held[ticket.id]
        if not ticket.void:
            self._transport.requeue(ticket.delivery)

    def orphan_ended(self, kind: SlotKind) -> None:
        """A task without a ticket is over: the ticket that stood for it may be used."""
        if not self._adopted[kind]:
            self._orphans[kind] -= 1
        elif self.draining:
            self._transport.requeue(self._adopted[kind].popleft().delivery)
        else:
            self._ask(self._adopted[kind].popleft())

    def drain(self) -> None:
        """No more claims. What has been asked is still answered."""
        self.draining = True

    def requeue_all(self) -> None:
        """The end: whatever was not answered, another worker may have."""
        for ticket in list(self._held.values()):
            if not ticket.serving:
                self.requeue(ticket)
        for adopted in self._adopted.values():
            while adopted:
                self._transport.requeue(adopted.popleft().delivery)

    # --- asking ---------------------------------------------------------------------------------------------------

    def ask_again(self) -> None:
        """Repeat what has not been answered, to the queue of the shard: its scheduler may be another one by now."""
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

    # --- losing ---------------------------------------------------------------------------------------------------

    def _void(self, kind: SlotKind) -> None:
        """The connection is gone: the broker gives all of these tickets to somebody again."""
        for ticket in [ticket for ticket in self._held.values() if ticket.kind == kind]:
            ticket.void = True
            del self._held[ticket.id]
            if ticket.serving:
                self._orphans[kind] += 1
        self._orphans[kind] += len(self._adopted[kind])
        self._adopted[kind].clear()
