"""Databases for tests."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import AsyncIterator

from sublet_platform.mongo.client import Mongo, connect
from sublet_platform.mongo.replica_set import ensure_replica_set


@contextlib.asynccontextmanager
async def fresh_database(mongo_url: str) -> AsyncIterator[Mongo]:
    """A new database, dropped at the end."""
    await ensure_replica_set(mongo_url)
    database = connect(mongo_url, f"sublet_test_{uuid.uuid4().hex}")
    try:
        yield database
    finally:
        await database.drop_database()
        database.close()
