"""AMQP URLs of the nodes of a RabbitMQ cluster (one, or several with commas between them), and connection timeouts."""

from __future__ import annotations

import re
from urllib.parse import parse_qs, urlsplit

HEARTBEAT_S = 10
"""A dead peer is noticed after two to three heartbeats; with RabbitMQ's default that would take minutes."""
CONNECT_TIMEOUT_S = 10.0
"""Timeout of one attempt to connect, because a machine that has vanished does not refuse the connection."""

_NEXT = re.compile(r"\s*,\s*(?=amqps?://)")


def addresses(urls: str) -> list[str]:
    """The URL of every node. A comma inside a password does not separate two URLs."""
    return _NEXT.split(urls.strip())


def with_heartbeat(url: str) -> str:
    """The URL of one node with `HEARTBEAT_S`, unless it contains another heartbeat already."""
    query = urlsplit(url).query
    if "heartbeat" in parse_qs(query):
        return url
    return f"{url}{'&' if query else '?'}heartbeat={HEARTBEAT_S}"
