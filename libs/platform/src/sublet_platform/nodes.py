"""A connection to one of several RabbitMQ nodes, whichever can be had."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from itertools import cycle
from typing import Any
from urllib.parse import parse_qs, urlsplit

from aio_pika.robust_connection import RobustConnection
from yarl import URL

from sublet_engine.addresses import addresses

HEARTBEAT_S = 10
"""A silent peer is noticed after two to three of these; RabbitMQ's own default would make that minutes."""
CONNECT_TIMEOUT_S = 10.0
"""One attempt to connect: a machine that vanished refuses nothing."""


def nodes_of(urls: str) -> list[str]:
    """The URL of every node, each asking for our heartbeat unless it asks for one itself."""
    return [_with_heartbeat(url) for url in addresses(urls)]


def _with_heartbeat(url: str) -> str:
    query = urlsplit(url).query
    if "heartbeat" in parse_qs(query):
        return url
    return f"{url}{'&' if query else '?'}heartbeat={HEARTBEAT_S}"


class NodeConnection(RobustConnection):
    """Goes on to the next node whenever it has lost one, or cannot have it."""

    def __init__(self, url: URL, *, urls: Sequence[str], **options: Any) -> None:
        super().__init__(url, **options)
        self._nodes = cycle(urls)
        self.url = URL(next(self._nodes))

    async def _on_connection_close(self, closing: asyncio.Future[Any]) -> None:
        self.url = URL(next(self._nodes))
        await super()._on_connection_close(closing)
