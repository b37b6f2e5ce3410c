"""The scheduler's store in MongoDB: ``runs``, ``durable_log``, ``workflows``, ``workers``."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import msgspec

from sublet_engine.run.state import LogRecord, Run, TaskRun
from sublet_engine.shard.counters import WAITING_REASONS
from sublet_platform.mongo.client import Index, Mongo
from sublet_platform.mongo.run_documents import document_of, json_text, metadata_tags, run_of, update_of
from sublet_platform.ports import (
    GONE_WORKER_RETENTION_S,
    Clock,
    RevisionConflict,
    RunChange,
    RunFilter,
    WorkerRecord,
    WorkflowRecord,
)
from sublet_protocol.specs import WorkflowSpec

_LIVE_CHUNK = 500
_WAITS = tuple(f"tasks.{name}" for name in ("name", "status", "replays", "met", "open_waits"))
_SCHEDULER_RETENTION_S = 60.0
_INDEXES = {
    "runs": (
        Index([("bucket", 1), ("created_at", 1)], only={"live": True}),
        Index([("waiting", 1), ("bucket", 1)], only={"waiting": {"$exists": True}}),
        Index([("created_at", -1)]),
        Index([("workflow", 1), ("created_at", -1)]),
        Index([("tags", 1)], sparse=True),
        Index([("parent.task_run_id", 1)], sparse=True),
        Index([("trigger.event_id", 1)], sparse=True),
    ),
    "durable_log": (Index([("task_run_id", 1), ("seq", 1)]),),
    "workers": (Index([("expire_at", 1)], expires=True),),
    "schedulers": (Index([("expire_at", 1)], expires=True),),
}


class MongoRunStore:
    """See `ports.RunStore`."""

    def __init__(self, mongo: Mongo, clock: Clock) -> None:
        self._mongo = mongo
        self._clock = clock

    async def ensure_indexes(self) -> None:
        await self._mongo.ensure_indexes(_INDEXES)

    async def load_runs(self, run_ids: Sequence[str]) -> list[Run]:
        if not run_ids:
            return []
        return [run_of(each) for each in await self._mongo.find("runs", {"_id": {"$in": list(run_ids)}})]

    async def load_waits(self, run_ids: Sequence[str]) -> Mapping[str, Sequence[TaskRun]]:
        if not run_ids:
            return {}
        found = await self._mongo.find("runs", {"_id": {"$in": list(run_ids)}}, only=_WAITS)
        return {each["_id"]: msgspec.convert(each.get("tasks", ()), list[TaskRun]) for each in found}

    async def load_live(self, buckets: Sequence[int]) -> AsyncIterator[list[Run]]:
        where = {"bucket": {"$in": list(buckets)}, "live": True}
        async for chunk in self._mongo.find_in_chunks("runs", where, sort=[("created_at", 1)], chunk=_LIVE_CHUNK):
            yield [run_of(each) for each in chunk]

    async def count_waiting(self, buckets: Sequence[int]) -> Mapping[str, int]:
        where = {"waiting": {"$in": WAITING_REASONS}, "bucket": {"$in": list(buckets)}}
        return await self._mongo.count_each("runs", where, "waiting")

    async def append_log(self, records: Sequence[LogRecord]) -> None:
        await self._mongo.write("durable_log", inserts=[_document(record) for record in records])

    async def load_logs(self, task_run_ids: Sequence[str]) -> list[LogRecord]:
        if not task_run_ids:
            return []
        where = {"task_run_id": {"$in": list(task_run_ids)}}
        documents = await self._mongo.find("durable_log", where, sort=[("task_run_id", 1), ("seq", 1)])
        return [msgspec.convert(_with_id(each), LogRecord) for each in documents]

    async def commit(self, changes: Sequence[RunChange]) -> None:
        inserts = [document_of(change.after) for change in changes if change.before is None]
        updates = [update_of(change.before, change.after) for change in changes if change.before is not None]
        written = await self._mongo.write("runs", inserts=inserts, updates=updates)
        if written.duplicates or written.updated < len(updates):
            lost = len(written.duplicates) + len(updates) - written.updated
            raise RevisionConflict(f"{lost} of {len(changes)} runs have another writer")

    async def save_workflow(self, spec: WorkflowSpec, registered_at: float) -> None:
        document = {
            "_id": f"{spec.name}@{spec.version}",
            "name": spec.name,
            "registered_at": registered_at,
            "spec": json_text(spec),
        }
        await self._mongo.replace_unless("workflows", document, {"registered_at": {"$gte": registered_at}})

    async def load_workflows(self) -> list[WorkflowRecord]:
        documents = await self._mongo.find("workflows", {}, sort=[("registered_at", 1)])
        return [
            WorkflowRecord(msgspec.json.decode(each["spec"], type=WorkflowSpec), each["registered_at"])
            for each in documents
        ]

    async def save_worker(self, worker: WorkerRecord) -> None:
        document = dataclasses.asdict(worker)
        document["_id"] = document.pop("id")
        if worker.gone:
            document["expire_at"] = datetime.fromtimestamp(worker.last_seen_at + GONE_WORKER_RETENTION_S, UTC)
        await self._mongo.replace("workers", [document])

    async def load_workers(self) -> list[WorkerRecord]:
        since = self._clock.now() - GONE_WORKER_RETENTION_S
        where = {"$or": [{"gone": False}, {"last_seen_at": {"$gt": since}}]}
        documents = await self._mongo.find("workers", where, sort=[("started_at", 1), ("_id", 1)])
        return [msgspec.convert(_with_id(each), WorkerRecord) for each in documents]

    async def beat(self, scheduler: str, now: float) -> Mapping[str, float]:
        expire_at = datetime.fromtimestamp(now + _SCHEDULER_RETENTION_S, UTC)
        await self._mongo.replace("schedulers", [{"_id": scheduler, "at": now, "expire_at": expire_at}])
        documents = await self._mongo.find("schedulers", {"at": {"$gt": now - _SCHEDULER_RETENTION_S}})
        return {each["_id"]: each["at"] for each in documents}

    async def list_runs(self, query: RunFilter) -> list[Run]:
        documents = await self._mongo.find(
            "runs",
            _where(query),
            sort=[("created_at", -1), ("_id", 1)],
            limit=query.limit,
            skip=query.offset,
        )
        return [run_of(each) for each in documents]


def _document(record: LogRecord) -> dict[str, Any]:
    document: dict[str, Any] = msgspec.to_builtins(record)
    document["_id"] = document.pop("id")
    return document


def _with_id(document: dict[str, Any]) -> dict[str, Any]:
    document["id"] = document.pop("_id")
    return document


def _where(query: RunFilter) -> dict[str, Any]:
    where: dict[str, Any] = {}
    created: dict[str, float] = {}
    if query.since is not None:
        created["$gte"] = query.since
    if query.until is not None:
        created["$lt"] = query.until
    if created:
        where["created_at"] = created
    if query.statuses:
        where["status"] = {"$in": list(query.statuses)}
    if query.workflows:
        where["workflow"] = {"$in": list(query.workflows)}
    if query.metadata:
        where["tags"] = {"$all": metadata_tags(query.metadata)}
    if query.parent_task_run_id is not None:
        where["parent.task_run_id"] = query.parent_task_run_id
    if query.event_id is not None:
        where["trigger.event_id"] = query.event_id
    return where
