"""One setting names one node, or all nodes of a cluster."""

from __future__ import annotations

import pytest

from sublet_engine.addresses import addresses


@pytest.mark.parametrize(
    ("urls", "each"),
    [
        ("amqp://guest:guest@127.0.0.1:5672/", ["amqp://guest:guest@127.0.0.1:5672/"]),
        ("amqp://a/v,amqps://b:1/v?heartbeat=5", ["amqp://a/v", "amqps://b:1/v?heartbeat=5"]),
        (" amqp://a ,\n  amqp://b ", ["amqp://a", "amqp://b"]),
        ("amqp://user:a,b@host/", ["amqp://user:a,b@host/"]),
    ],
)
def test_commas_stand_between_nodes(urls: str, each: list[str]) -> None:
    assert addresses(urls) == each
