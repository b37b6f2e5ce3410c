"""What a batch of messages changes: gathered while it is decided, and taken out whole to be committed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import MutableMapping

import msgspec
from msgspec.structs import replace

from sublet_engine.run.effects import Effects
from sublet_engine.run.state import Effect, LogRecord, OutboxItem, Run, TaskRun
from sublet_engine.shard.workers import Worker
from sublet_protocol.messages import Grant, Record, encode_one
from sublet_protocol.specs import WorkflowSpec


class Publication(msgspec.Struct, frozen=True):
    """An encoded message and where it goes (as in `runs.Effect`)."""

    to: str
    body: bytes
    durable: bool = False
    """Nobody will ask for it again: its publish must be confirmed before the batch is done."""


class DurableGrant(msgspec.Struct, frozen=True):
    """A grant that still needs the durable log of its task."""

    inbox: str
    grant: Grant
    task: TaskRun
    task_run_id: str


class Resend(msgspec.Struct, frozen=True):
    """A resident task that seems to have missed results: send those after ``delivered`` again."""

    inbox: str
    lease: str
    task: TaskRun
    delivered: int


class WorkerChange(msgspec.Struct, frozen=True):
    """What is to be stored of a worker."""

    worker: Worker
    actions: tuple[str, ...]
    gone: bool = False


class Batch(msgspec.Struct):
    """What a batch of messages changed. To be written in this order: log, runs, then everything else."""

    changes: list[tuple[Run | None, Run]]
    log: list[LogRecord]
    publications: list[Publication]
    tickets: list[Publication]
    """Hints: may be published at once, without waiting for the commit."""
    durable_grants: list[DurableGrant]
    resends: list[Resend]
    workflows: list[tuple[WorkflowSpec, float]]
    """Definitions to save, with the time of registration."""
    workers: list[WorkerChange]
    """Workers to save, for people and later owners. Only the first shard names any."""


class UnitOfWork:
    """The batch that is being decided. ``runs`` are those of the shard; sealed ones replace them there.

    Effects that no message asked for (a deadline, a lost worker) have nobody to ask again, should this process die
    between commit and publish. Such a run stays marked *unasked* in the store until the next batch, so that the next
    owner finds it and publishes its outbox.
    """

    def __init__(self, owner_term: str, runs: MutableMapping[str, Run]) -> None:
        self._owner_term = owner_term
        self._runs = runs
        self._published_needing_republish: dict[str, None] = {}
        self.is_repeatable = True
        """Whether the message that is being handled comes again if we die."""
        self._begin()

    def _begin(self) -> None:
        self._before: dict[str, Run | None] = {}
        self._outbox: dict[str, list[OutboxItem]] = defaultdict(list)
        self._needs_republish: dict[str, None] = {}
        self._log: list[LogRecord] = []
        self._publications: list[Publication] = []
        self.durable_grants: list[DurableGrant] = []
        self.resends: list[Resend] = []
        self.workflows: dict[tuple[str, str], tuple[WorkflowSpec, float]] = {}
        self.workers: list[WorkerChange] = []

    def changed(self, run_id: str, before: Run | None) -> None:
        """This run is to be committed; ``before`` is what was stored (None: nothing) if it is the first change."""
        self._before.setdefault(run_id, before)

    def add(self, run_id: str, effects: Effects) -> None:
        """What a decision about a run gave besides its new state."""
        for effect in effects.messages:
            self._publish(run_id, effect)
        self._log.extend(effects.log)

    def _publish(self, run_id: str, effect: Effect) -> None:
        body = encode_one(effect.message)
        self._publications.append(Publication(effect.to, body, effect.durable))
        if effect.durable:
            self._outbox[run_id].append(OutboxItem(effect.to, body.decode()))
            self._before.setdefault(run_id, self._runs.get(run_id))
            if not self.is_repeatable:
                self._needs_republish[run_id] = None

    def send(self, to: str, message: Record, *, durable: bool = False) -> None:
        """A message that belongs to no run: somebody asks again if it is lost."""
        self._publications.append(Publication(to, encode_one(message), durable))

    def republish(self, run: Run) -> None:
        """What another owner wrote last may not have been published. It stays in the outbox until this has succeeded,
        whatever else happens to the run meanwhile.

        A run that is not live may leave the memory, and so is written as ours, with its outbox, even if nothing else
        changes: else it would be published again each time that it is loaded, and two runs that tell each other
        something would never come to rest.
        """
        self._publications.extend(Publication(item.to, item.message.encode(), durable=True) for item in run.outbox)
        self._outbox[run.id].extend(run.outbox)
        if run.needs_republish:
            self._needs_republish[run.id] = None
        if run.outbox and not run.live:
            self._before.setdefault(run.id, run)

    def take(self, tickets: list[Publication]) -> Batch:
        """The batch; the next one begins."""
        for run_id in self._published_needing_republish:  # the last batch is published: its runs need no mark any more
            self._before.setdefault(run_id, self._runs[run_id])
        self._published_needing_republish = self._needs_republish
        batch = Batch(
            changes=[(before, self._next_revision(run_id, before)) for run_id, before in self._before.items()],
            log=self._log,
            publications=self._publications,
            tickets=tickets,
            durable_grants=self.durable_grants,
            resends=self.resends,
            workflows=list(self.workflows.values()),
            workers=self.workers,
        )
        self._begin()
        return batch

    def _next_revision(self, run_id: str, before: Run | None) -> Run:
        """The run as it is stored: next revision, this epoch, and the effects that must not be lost."""
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
