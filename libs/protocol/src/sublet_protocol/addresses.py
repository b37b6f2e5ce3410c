"""Where the nodes of a RabbitMQ cluster are: one URL, or several with commas between them; and how patient we are."""

from __future__ import annotations

import re
from urllib.parse import parse_qs, urlsplit

HEARTBEAT_S = 10
"""A silent peer is noticed after two to three of these; RabbitMQ's own default would make that minutes."""
CONNECT_TIMEOUT_S = 10.0
"""One attempt to connect: a machine that vanished refuses nothing."""

_NEXT = re.compile(r"\s*,\s*(?=amqps?://)")


def addresses(urls: str) -> list[str]:
    """The URL of every node. A comma in a password is none between two URLs."""
    return _NEXT.split(urls.strip())


def with_heartbeat(url: str) -> str:
    """The URL of one node, asking for our heartbeat unless it asks for one itself."""
    query = urlsplit(url).query
    if "heartbeat" in parse_qs(query):
        return url
    return f"{url}{'&' if query else '?'}heartbeat={HEARTBEAT_S}"
