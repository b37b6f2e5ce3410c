"""What must not be left behind when a run has ended."""

from __future__ import annotations

from acceptance.stack import Stack
from sublet_platform.mongo.client import connect
from sublet_platform.settings import ServiceSettings
from sublet_protocol import ids


async def find_leaks(stack: Stack) -> list[str]:
    """The timers and the waits for events whose run has ended, of all runs that the stack has seen."""
    database = connect(stack.variables["SUBLET_MONGO_URL"], ServiceSettings().mongo_database)
    try:
        ended = {run["_id"] for run in await database.find("runs", {"finished_at": {"$gt": 0}})}
        waits = [*await database.find("timers", {}), *await database.find("subscriptions", {})]
    finally:
        database.close()
    return [wait["_id"] for wait in waits if ids.run_of(wait["_id"]) in ended]
