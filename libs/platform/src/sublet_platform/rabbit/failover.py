"""A connection to one of several RabbitMQ nodes."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from itertools import cycle
from typing import Any

from aio_pika.robust_connection import RobustConnection
from yarl import URL

from sublet_protocol.addresses import addresses, with_heartbeat


def nodes_of(urls: str) -> list[str]:
    """The URL of every node, with our heartbeat interval unless the URL has one."""
    return [with_heartbeat(url) for url in addresses(urls)]


class NodeConnection(RobustConnection):
    """A robust connection that tries the next node when it has lost one or cannot connect to it."""

    def __init__(self, url: URL, *, urls: Sequence[str], **options: Any) -> None:
        super().__init__(url, **options)
        self._nodes = cycle(urls)
        self.url = URL(next(self._nodes))

    async def _on_connection_close(self, closing: asyncio.Future[Any]) -> None:
        self.url = URL(next(self._nodes))
        await super()._on_connection_close(closing)
