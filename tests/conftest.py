"""Fixtures for tests that need a RabbitMQ and a MongoDB, and the clock of those that need none."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator

import pytest

from clocks import ManualClock
from databases import fresh_database
from servers import Servers, ServersUnavailable, find_servers
from sublet_platform.mongo import Mongo


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture(scope="session")
def servers() -> Iterator[Servers]:
    """A RabbitMQ and a MongoDB. Without them: skipped on a laptop, failed where they are required."""
    search = find_servers()
    try:
        found = search.__enter__()
    except ServersUnavailable as error:
        if os.environ.get("SUBLET_REQUIRE_SERVERS") == "1":
            pytest.fail(f"SUBLET_REQUIRE_SERVERS=1, but {error}")
        pytest.skip(str(error))
    try:
        yield found
    finally:
        search.__exit__(None, None, None)


@pytest.fixture
async def mongo(servers: Servers) -> AsyncIterator[Mongo]:
    """A database of its own for each test."""
    async with fresh_database(servers.mongo_url) as database:
        yield database
