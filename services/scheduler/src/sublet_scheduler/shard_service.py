"""The service of one shard: decode, decide, commit, publish. The batch loop acknowledges.

Log first, state second, publish third, acknowledge last. After any failure in between the messages are redelivered, the
shard is rebuilt from the store, and the effects of the last update of each run are published again.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence

import msgspec

from sublet_engine.run import durable_log
from sublet_engine.run.state import LogRecord, OutgoingMessage, Run
from sublet_engine.shard.shard import Shard
from sublet_engine.shard.unit_of_work import Batch, DurableGrant, Resend, WorkerChange
from sublet_platform.dead_letters import Reject
from sublet_platform.ports import Broker, Clock, Delivery, RunChange, RunStore, WorkerRecord
from sublet_protocol import ids, limits
from sublet_protocol.destinations import Inbox
from sublet_protocol.messages import (
    MalformedMessage,
    OperationCompleted,
    RunRequest,
    ShardMessage,
    decode_for_shard,
    encode_one,
)
from sublet_protocol.specs import SlotKind
from sublet_protocol.topology import claim_key, shard_key
from sublet_scheduler.metrics import SchedulerMetrics
from sublet_scheduler.routing import outgoing

logger = logging.getLogger(__name__)

_RECENTLY_S = limits.WORKER_SAVE_INTERVAL_S + limits.WORKER_LOST_S
"""A worker that was saved more recently may be live."""


class ShardService:
    """``index`` of ``shards``. ``claim_key``: where workers send claims. Every scheduler receives them and the
    owner of the shard answers, so that tickets remain valid without the scheduler that issued them."""

    def __init__(
        self,
        index: int,
        shards: int,
        *,
        store: RunStore,
        broker: Broker,
        clock: Clock,
        new_id: Callable[[], str],
        metrics: SchedulerMetrics,
        refuse: Reject,
    ) -> None:
        self.index = index
        self.claim_key = claim_key(index)
        self._shards = shards
        self._buckets = ids.buckets_of_shard(index, shards)
        self._store, self._broker, self._clock = store, broker, clock
        self._new_id, self._metrics, self._refuse = new_id, metrics, refuse
        self._shard: Shard | None = None
        self._latest: Delivery | None = None
        """The latest delivery of the shard's queue."""
        self._heard_at = 0.0
        self._built_at = 0.0

    def active(self, within_s: float = 3.0) -> bool:
        """This process owns the shard: it has received a message of its queue recently (at least a tick)."""
        return self._shard is not None and self._clock.now() - self._heard_at <= within_s

    def drop(self) -> None:
        """Drop the shard. The next batch rebuilds it from the store."""
        self._shard = None
        self._metrics.forget(self.index)

    async def process(self, deliveries: list[Delivery]) -> None:
        """Handle a whole batch.

        Raises StoreUnavailable, BrokerUnavailable or RevisionConflict. Then nothing of the batch may be acknowledged,
        and the shard has been dropped.
        """
        try:
            await self._process(deliveries)
        except BaseException:
            self.drop()
            raise

    async def _process(self, deliveries: list[Delivery]) -> None:
        messages = await self._decode(deliveries)
        shard = await self._begin_ownership(deliveries)
        if shard is None:
            return  # claims while another process owns the shard; their workers claim again
        await self._load_missing(shard, messages)
        now = self._clock.now()
        for _, message in messages:
            shard.handle(message, now)
        await self._carry_out(shard.take())
        self._metrics.observe(self.index, shard)

    async def _decode(self, deliveries: list[Delivery]) -> list[tuple[Delivery, ShardMessage]]:
        messages: list[tuple[Delivery, ShardMessage]] = []
        for delivery in deliveries:
            try:
                decoded = decode_for_shard(delivery.body)
                _check_size(delivery.body, decoded)
            except (MalformedMessage, _TooLarge) as error:
                await self._refuse(delivery, f"not a message for a scheduler: {error}")
            else:
                messages.extend((delivery, message) for message in decoded)
        return messages

    # --- ownership --------------------------------------------------------------------------------------------

    async def _begin_ownership(self, deliveries: list[Delivery]) -> Shard | None:
        """The shard in memory. A delivery on a new channel of the shard's queue may mean that another process owned the
        shard in between, so it is rebuilt. While that channel is closed, another process owns the shard."""
        queued = [delivery for delivery in deliveries if delivery.needs_ack]
        before, self._latest = self._latest, queued[-1] if queued else self._latest
        if self._latest is None:
            return None
        if before is None or before.channel != self._latest.channel or self._broker.is_void(self._latest):
            self.drop()
        if queued:
            self._heard_at = self._clock.now()
        if self._shard is None and queued:
            self._shard = await self._build()
        return self._shard

    async def _build(self) -> Shard:
        now = self._built_at = self._clock.now()
        shard = Shard(
            owner_term=self._new_id(),
            claim_key=self.claim_key,
            shard_key=shard_key(self.index, self._shards),
            first=self.index == 0,
            shards=self._shards,
            new_id=self._new_id,
            now=now,
        )
        await self._load_workflows(shard)
        for worker in await self._store.load_workers():
            shard.load_pool(worker.pool, worker.actions, worker.started_at)
            if not worker.gone and now - worker.last_seen_at <= _RECENTLY_S:
                slots: dict[SlotKind, int] = {"task": worker.slots, "durable": worker.durable_slots}
                shard.load_worker(
                    worker.id, worker.pool, worker.inbox, slots, name=worker.name, started_at=worker.started_at
                )
        shard.state.counters.waiting.update(await self._store.count_waiting(self._buckets))
        runs = 0
        async for chunk in self._store.load_live(self._buckets):
            await self._load(shard, chunk)
            runs += len(chunk)
        logger.info("shard %d taken over with %d live runs", self.index, runs)
        return shard

    async def _load_missing(self, shard: Shard, messages: list[tuple[Delivery, ShardMessage]]) -> None:
        needed = {
            run_id
            for delivery, message in messages
            if (run_id := Shard.run_needed(message)) is not None and not self._surely_new(delivery, message)
        }
        missing = needed.difference(shard.state.runs)
        if missing:
            await self._load(shard, await self._store.load_runs(sorted(missing)))
        if any(isinstance(message, RunRequest) and not shard.has_workflow(message.workflow) for _, message in messages):
            await self._load_workflows(shard)

    async def _load(self, shard: Shard, runs: Sequence[Run]) -> None:
        """Load definitions again that are unknown. The previous owner may have been slow to stop: it may have saved
        definitions, and begun runs of them, after this shard was built."""
        if any(shard.workflow_of(run) is None and not run.terminal for run in runs):
            await self._load_workflows(shard)
        shard.load(runs)

    async def _load_workflows(self, shard: Shard) -> None:
        for record in await self._store.load_workflows():
            shard.load_workflow(record.spec, record.registered_at)

    def _surely_new(self, delivery: Delivery, message: ShardMessage) -> bool:
        """A request for a run that is not stored yet: its id is random and the message is not redelivered.

        If the run is stored after all, the commit conflicts. Then the shard is rebuilt, and the request is redelivered
        and marked as such.
        """
        if delivery.redelivered or self._clock.now() - self._built_at < limits.REQUEST_REPEATED_S:
            return False
        return isinstance(message, RunRequest) and message.parent is None and message.trigger is None

    # --- effects ----------------------------------------------------------------------------------------------

    async def _carry_out(self, batch: Batch) -> None:
        if batch.tickets:
            self._broker.publish_nowait(outgoing(batch.tickets, self._shards))
        for spec, registered_at in batch.workflows:
            await self._store.save_workflow(spec, registered_at)
        for change in batch.workers:
            await self._store.save_worker(_record_of(change))
        if batch.log:
            await self._store.append_log(batch.log)
        # The log entries for the grants are stored by now, so they are read while the runs are written.
        with_logs, committed = await asyncio.gather(
            self._with_logs(batch.durable_grants, batch.resends), self._commit(batch), return_exceptions=True
        )
        if isinstance(committed, BaseException):
            raise committed
        if isinstance(with_logs, BaseException):
            raise with_logs
        await self._publish(with_logs + batch.messages)

    async def _commit(self, batch: Batch) -> None:
        if batch.changes:
            await self._store.commit([RunChange(before, after) for before, after in batch.changes])

    async def _publish(self, messages: list[OutgoingMessage]) -> None:
        unconfirmed = [message for message in messages if not message.durable]
        if unconfirmed:
            self._broker.publish_nowait(outgoing(unconfirmed, self._shards))
        durable = [message for message in messages if message.durable]
        if durable:
            await self._broker.publish(outgoing(durable, self._shards))

    async def _with_logs(self, grants: list[DurableGrant], resends: list[Resend]) -> list[OutgoingMessage]:
        """Add the durable logs to the grants, and read the results to resend, with one query."""
        if not grants and not resends:
            return []
        wanted = {item.task_run_id for item in grants} | {ids.task_run_of(item.lease) for item in resends}
        records: dict[str, list[LogRecord]] = {task_run: [] for task_run in wanted}
        for record in await self._store.load_logs(list(wanted)):
            records[record.task_run_id].append(record)
        messages = []
        for item in grants:
            log = durable_log.entries_of(durable_log.committed(item.task, records[item.task_run_id]))
            grant = msgspec.structs.replace(item.grant, log=log)
            messages.append(OutgoingMessage(Inbox(item.inbox), encode_one(grant), durable=False))
        for resend in resends:
            for record in durable_log.committed(resend.task, records[ids.task_run_of(resend.lease)]):
                if record.kind == "done" and record.order > resend.delivered:
                    completed = OperationCompleted(resend.lease, record.operation_id, durable_log.completion_of(record))
                    messages.append(OutgoingMessage(Inbox(resend.inbox), encode_one(completed), durable=False))
        return messages


class _TooLarge(ValueError):
    """A payload exceeds the limit. The SDK checks it before; other clients may not."""


def _check_size(body: bytes, messages: list[ShardMessage]) -> None:
    """Refuse an input over the limit before it is stored."""
    if len(body) <= limits.PAYLOAD_MAX_BYTES:
        return
    for message in messages:
        if isinstance(message, RunRequest) and len(message.input) > limits.PAYLOAD_MAX_BYTES:
            raise _TooLarge(
                f"the input of run {message.run_id} has {len(message.input):,} bytes; "
                f"at most {limits.PAYLOAD_MAX_BYTES:,} are allowed"
            )


def _record_of(change: WorkerChange) -> WorkerRecord:
    worker = change.worker
    return WorkerRecord(
        id=worker.id,
        pool=worker.pool,
        name=worker.name,
        inbox=worker.inbox,
        slots=worker.slots.get("task", 0),
        durable_slots=worker.slots.get("durable", 0),
        actions=change.actions,
        started_at=worker.started_at,
        last_seen_at=worker.silent_since,
        gone=change.gone,
    )
