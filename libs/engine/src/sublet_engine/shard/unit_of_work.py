"""The changes of a batch of messages: collected while the messages are handled, then taken out to be committed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import MutableMapping

import msgspec
from msgspec.structs import replace

from sublet_engine.run.effects import Effects
from sublet_engine.run.state import LogRecord, OutgoingMessage, Run, TaskRun
from sublet_engine.shard.workers import Worker
from sublet_protocol.destinations import Destination
from sublet_protocol.messages import Grant, Record, encode_one
from sublet_protocol.specs import WorkflowSpec


class DurableGrant(msgspec.Struct, frozen=True):
    """A grant that still needs the durable log of its task."""

    inbox: str
    grant: Grant
    task: TaskRun
    task_run_id: str


class Resend(msgspec.Struct, frozen=True):
    """A resident task that has missed results: those after the order ``delivered`` must be sent again."""

    inbox: str
    lease: str
    task: TaskRun
    delivered: int


class WorkerChange(msgspec.Struct, frozen=True):
    """A worker to save."""

    worker: Worker
    actions: tuple[str, ...]
    gone: bool = False


class Batch(msgspec.Struct):
    """The changes of a batch. They must be written in this order: log, runs, then everything else."""

    changes: list[tuple[Run | None, Run]]
    log: list[LogRecord]
    messages: list[OutgoingMessage]
    tickets: list[OutgoingMessage]
    """Unconfirmed messages that may be published before the commit."""
    durable_grants: list[DurableGrant]
    resends: list[Resend]
    workflows: list[tuple[WorkflowSpec, float]]
    """Definitions to save, with the time of registration."""
    workers: list[WorkerChange]
    """Workers to save, for people and later owners. Only the first shard has any."""


class UnitOfWork:
    """The batch that is being handled. ``runs``: those of the shard; `take` replaces them by their next revision.

    If this process dies between commit and publish, the messages of the batch are redelivered and their effects are
    published again. No message is redelivered for a deadline or a lost worker. A run that such an effect changed is
    stored with ``needs_republish`` until the next batch, so that the next owner loads it and publishes its outbox.
    """

    def __init__(self, owner_term: str, runs: MutableMapping[str, Run]) -> None:
        self._owner_term = owner_term
        self._runs = runs
        self._published_needing_republish: dict[str, None] = {}
        self.is_repeatable = True
        """The message that is being handled is redelivered if this process dies, and leads to the same run."""
        self._begin()

    def _begin(self) -> None:
        self._before: dict[str, Run | None] = {}
        self._outbox: dict[str, list[OutgoingMessage]] = defaultdict(list)
        self._needs_republish: dict[str, None] = {}
        self._log: list[LogRecord] = []
        self._messages: list[OutgoingMessage] = []
        self.durable_grants: list[DurableGrant] = []
        self.resends: list[Resend] = []
        self.workflows: dict[tuple[str, str], tuple[WorkflowSpec, float]] = {}
        self.workers: list[WorkerChange] = []

    def changed(self, run_id: str, before: Run | None) -> None:
        """This run must be committed. ``before``: the stored run (None: it is new), if this is its first change."""
        self._before.setdefault(run_id, before)

    def add(self, run_id: str, effects: Effects) -> None:
        """The effects of a decision about a run."""
        self._messages.extend(effects.messages)
        self._log.extend(effects.log)
        durable = [message for message in effects.messages if message.durable]
        if durable:
            self._outbox[run_id].extend(durable)
            self._before.setdefault(run_id, self._runs.get(run_id))
            if not self.is_repeatable:
                self._needs_republish[run_id] = None

    def send(self, to: Destination, message: Record, *, durable: bool = False) -> None:
        """A message that belongs to no run. Its receiver asks again if it is lost."""
        self._messages.append(OutgoingMessage(to, encode_one(message), durable))

    def republish(self, run: Run) -> None:
        """Publish the outbox of a run that another owner wrote, because that owner may not have published it. It stays
        in the outbox until this has succeeded, also if the run changes meanwhile.

        A run that is not live may be dropped from memory. So it is committed in this owner term even if nothing else
        changes. Otherwise its outbox would be published each time that the run is loaded, and two runs whose outboxes
        address each other would load and publish each other without end.
        """
        self._messages.extend(run.outbox)
        self._outbox[run.id].extend(run.outbox)
        if run.needs_republish:
            self._needs_republish[run.id] = None
        if run.outbox and not run.live:
            self._before.setdefault(run.id, run)

    def take(self, tickets: list[OutgoingMessage]) -> Batch:
        """The changes since the last call. All messages of the last batch must have been published."""
        for run_id in self._published_needing_republish:  # the mark is removed, because the outbox is published
            self._before.setdefault(run_id, self._runs[run_id])
        self._published_needing_republish = self._needs_republish
        batch = Batch(
            changes=[(before, self._next_revision(run_id, before)) for run_id, before in self._before.items()],
            log=self._log,
            messages=self._messages,
            tickets=tickets,
            durable_grants=self.durable_grants,
            resends=self.resends,
            workflows=list(self.workflows.values()),
            workers=self.workers,
        )
        self._begin()
        return batch

    def _next_revision(self, run_id: str, before: Run | None) -> Run:
        """The run in the form that is stored: with the next revision, this owner term, and its outbox."""
        outbox = tuple(self._outbox.get(run_id, ()))
        run = replace(
            self._runs[run_id],
            revision=before.revision + 1 if before is not None else 1,
            owner_term=self._owner_term,
            outbox=before.outbox if before is not None and before.outbox == outbox else outbox,
            needs_republish=run_id in self._needs_republish,
        )
        self._runs[run_id] = run
        return run
