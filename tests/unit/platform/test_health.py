"""The health endpoints of a service."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from sublet_platform.health import Health, health_routes


async def fine() -> str | None:
    return None


async def absent() -> str | None:
    return "not connected"


async def broken() -> str | None:
    raise RuntimeError("no idea")


async def silent() -> str | None:
    await asyncio.Event().wait()
    return None


async def ask(health: Health, path: str) -> tuple[int, Any]:
    """Status and JSON body of a GET."""
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        return {"type": "http.request"}

    scope = {"type": "http", "method": "GET", "path": path, "headers": [], "query_string": b""}
    await dict(health_routes(health))[path](scope, receive, send)
    return sent[0]["status"], json.loads(sent[1]["body"])


async def test_a_service_with_nothing_missing_is_ready() -> None:
    health = Health()
    health.add("broker", fine)
    assert await ask(health, "/health") == (200, {"status": "ok"})


async def test_missing_parts_are_named() -> None:
    health = Health()
    health.add("broker", absent)
    health.add("database", fine)
    health.add("shell", broken)
    status, body = await ask(health, "/health")
    assert status == 503
    assert body["missing"] == {"broker": "not connected", "shell": "RuntimeError: no idea"}


async def test_a_check_that_never_answers_does_not_delay_the_others() -> None:
    health = Health()
    health.add("database", silent)
    health.add("broker", absent)
    assert set(await health.missing()) == {"database", "broker"}


async def test_a_process_is_alive_although_parts_are_missing() -> None:
    health = Health()
    health.add("broker", absent)
    assert await ask(health, "/health/live") == (200, {"status": "alive"})
