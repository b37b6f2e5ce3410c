"""Where the nodes of a RabbitMQ cluster are: one URL, or several with commas between them."""

from __future__ import annotations

import re

_NEXT = re.compile(r"\s*,\s*(?=amqps?://)")


def addresses(urls: str) -> list[str]:
    """The URL of every node. A comma in a password is none between two URLs."""
    return _NEXT.split(urls.strip())
