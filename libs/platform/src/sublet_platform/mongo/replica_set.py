"""Initiates a replica set of the MongoDB servers that the URL names.

``python -m sublet_platform.mongo.replica_set [mongo_url] [--member host:port ...]`` waits for the first of them,
initiates ``rs0`` unless that has been done, and waits for a writable primary.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import time
from collections.abc import Sequence
from urllib.parse import urlsplit, urlunsplit

from sublet_platform.mongo.client import Mongo, connect
from sublet_platform.ports import StoreUnavailable

DEFAULT_URL = "mongodb://127.0.0.1:27017/"
NAME = "rs0"
_PAUSE_S = 0.25


def members_of(url: str) -> list[str]:
    """Every ``host:port`` of a MongoDB URL.

    Raises:
        ValueError: there is none.
    """
    hosts = urlsplit(url).netloc.rpartition("@")[2]
    if not hosts:
        raise ValueError(f"no host in the MongoDB URL {url!r}")
    return [host if ":" in host else f"{host}:27017" for host in hosts.split(",")]


async def ensure_replica_set(url: str, members: Sequence[str] = (), timeout_s: float = 60.0) -> None:
    """Idempotent; ``members`` are the addresses by which clients reach the servers (default: the URL's).

    Raises:
        TimeoutError: no writable primary after ``timeout_s``.
    """
    members = members or members_of(url)
    deadline = time.monotonic() + timeout_s
    while True:
        # Each attempt uses a new client. A client from before the initiation would keep its old view of the server.
        mongo = connect(_first_of(url), "admin", direct=True)
        try:
            if await _has_primary(mongo, members):
                return
        except StoreUnavailable as error:
            if time.monotonic() > deadline:
                raise TimeoutError(f"no MongoDB at {members[0]} after {timeout_s:g} s: {error}") from error
        finally:
            mongo.close()
        if time.monotonic() > deadline:
            raise TimeoutError(f"the MongoDB at {members[0]} has no primary after {timeout_s:g} s")
        await asyncio.sleep(_PAUSE_S)


def _first_of(url: str) -> str:
    """The URL of the first host alone, which may not belong to a replica set yet."""
    parts = urlsplit(url)
    user, at, _ = parts.netloc.rpartition("@")
    options = [option for option in parts.query.split("&") if not option.lower().startswith("replicaset=")]
    return urlunsplit(parts._replace(netloc=f"{user}{at}{members_of(url)[0]}", query="&".join(options)))


async def _has_primary(mongo: Mongo, members: Sequence[str]) -> bool:
    answer = await mongo.hello()
    if not answer.get("setName"):
        await mongo.initiate_replica_set(NAME, members)
        return False
    primary = answer.get("primary")
    return bool(answer.get("isWritablePrimary")) or primary not in (None, answer.get("me"))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m sublet_platform.mongo.replica_set", description=__doc__)
    parser.add_argument("mongo_url", nargs="?", default=os.environ.get("SUBLET_MONGO_URL", DEFAULT_URL))
    parser.add_argument(
        "--member", action="append", help="host:port by which clients reach a server (default: the URL's)"
    )
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds (default: 60)")
    arguments = parser.parse_args()
    try:
        asyncio.run(ensure_replica_set(arguments.mongo_url, arguments.member, arguments.timeout))
    except (TimeoutError, ValueError) as error:
        sys.exit(str(error))
    print(f"{NAME} of {', '.join(arguments.member or members_of(arguments.mongo_url))} has a primary")


if __name__ == "__main__":
    main()
