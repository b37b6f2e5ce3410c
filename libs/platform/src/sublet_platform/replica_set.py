"""Makes a fresh mongod a replica set of one.

``python -m sublet_platform.replica_set [mongo_url] [--member host:port]`` waits for the server, initiates ``rs0``
unless that has been done, and returns when it is a writable primary.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import time
from urllib.parse import urlsplit

from sublet_platform.mongo import Mongo, connect
from sublet_platform.ports import StoreUnavailable

DEFAULT_URL = "mongodb://127.0.0.1:27017/"
NAME = "rs0"
_PAUSE_S = 0.25


def member_of(url: str) -> str:
    """The first ``host:port`` of a MongoDB URL.

    Raises:
        ValueError: there is none.
    """
    first = urlsplit(url).netloc.rpartition("@")[2].partition(",")[0]
    if not first:
        raise ValueError(f"no host in the MongoDB URL {url!r}")
    return first if ":" in first else f"{first}:27017"


async def ensure_replica_set(url: str, member: str | None = None, timeout_s: float = 60.0) -> None:
    """Idempotent; ``member`` is the address by which clients reach the server (default: the URL's).

    Raises:
        TimeoutError: no writable primary after ``timeout_s``.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        # Each attempt with a client of its own: one made before the initiation keeps its view of the server.
        mongo = connect(url, "admin", direct=True)
        try:
            if await _is_primary(mongo, member or member_of(url)):
                return
        except StoreUnavailable as error:
            if time.monotonic() > deadline:
                raise TimeoutError(f"no MongoDB at {member_of(url)} after {timeout_s:g} s: {error}") from error
        finally:
            mongo.close()
        if time.monotonic() > deadline:
            raise TimeoutError(f"the MongoDB at {member_of(url)} is no primary after {timeout_s:g} s")
        await asyncio.sleep(_PAUSE_S)


async def _is_primary(mongo: Mongo, member: str) -> bool:
    answer = await mongo.hello()
    if answer.get("isWritablePrimary") and answer.get("setName"):
        return True
    if not answer.get("setName"):
        await mongo.initiate_replica_set(NAME, member)
    return False


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m sublet_platform.replica_set", description=__doc__)
    parser.add_argument("mongo_url", nargs="?", default=os.environ.get("SUBLET_MONGO_URL", DEFAULT_URL))
    parser.add_argument("--member", help="host:port by which clients reach the server (default: the URL's)")
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds (default: 60)")
    arguments = parser.parse_args()
    try:
        asyncio.run(ensure_replica_set(arguments.mongo_url, arguments.member, arguments.timeout))
    except (TimeoutError, ValueError) as error:
        sys.exit(str(error))
    print(f"{arguments.member or member_of(arguments.mongo_url)} is the primary of {NAME}")


if __name__ == "__main__":
    main()
