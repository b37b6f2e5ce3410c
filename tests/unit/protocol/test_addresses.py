"""One setting names one node, or all nodes of a cluster."""

from __future__ import annotations

import pytest

from sublet_protocol.addresses import addresses, with_heartbeat


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


@pytest.mark.parametrize(
    ("url", "asked"),
    [
        ("amqp://a/", "amqp://a/?heartbeat=10"),
        ("amqp://a/v?name=x", "amqp://a/v?name=x&heartbeat=10"),
        ("amqp://a/?heartbeat=5", "amqp://a/?heartbeat=5"),
    ],
)
def test_a_node_is_asked_for_our_heartbeat_unless_its_url_asks_for_another(url: str, asked: str) -> None:
    assert with_heartbeat(url) == asked
