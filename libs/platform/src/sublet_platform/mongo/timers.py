"""The timer's store in MongoDB: ``timers``."""

from __future__ import annotations

from collections.abc import Sequence

from sublet_platform.mongo.client import Document, Index, Mongo
from sublet_platform.ports import StoredTimer

_INDEXES = {"timers": (Index([("due", 1)]),)}


class MongoTimerStore:
    """See `ports.TimerStore`."""

    def __init__(self, mongo: Mongo) -> None:
        self._mongo = mongo

    async def ensure_indexes(self) -> None:
        await self._mongo.ensure_indexes(_INDEXES)

    async def change_timers(self, upserts: Sequence[StoredTimer], deletes: Sequence[str]) -> None:
        await self._mongo.write("timers", inserts=[_document(timer) for timer in upserts], deletes=deletes)

    async def due_timers(self, until: float, limit: int) -> list[StoredTimer]:
        if limit <= 0:
            return []
        documents = await self._mongo.find("timers", {"due": {"$lte": until}}, sort=[("due", 1)], limit=limit)
        return [StoredTimer(each.pop("_id"), **each) for each in documents]

    async def count_timers(self) -> int:
        return await self._mongo.count("timers")


def _document(timer: StoredTimer) -> Document:
    return {
        "_id": timer.id,
        "due": timer.due,
        "task_run_id": timer.task_run_id,
        "operation_id": timer.operation_id,
        "key": timer.key,
    }
