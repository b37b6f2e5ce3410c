"""Health of a service: ``/health`` (readiness) names what is missing, ``/health/live`` always answers."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import msgspec
from faststream.asgi import AsgiResponse, get
from faststream.asgi.handlers import HttpHandler
from faststream.asgi.types import Scope

CHECK_TIMEOUT_S = 2.0

Check = Callable[[], Awaitable[str | None]]
"""Returns the problem as text, or None."""


Fact = Callable[[], object]
"""Returns information that can be encoded as JSON."""


class Health:
    def __init__(self) -> None:
        self._checks: dict[str, Check] = {}
        self._facts: dict[str, Fact] = {}

    def add(self, name: str, check: Check) -> None:
        self._checks[name] = check

    def tell(self, name: str, fact: Fact) -> None:
        """Add information to every answer. It does not affect readiness."""
        self._facts[name] = fact

    def facts(self) -> dict[str, object]:
        return {name: fact() for name, fact in self._facts.items()}

    async def missing(self) -> dict[str, str]:
        """The problems by the name of their check. All checks run concurrently."""
        answers = await asyncio.gather(*(_answer(check) for check in self._checks.values()))
        return {name: wrong for name, wrong in zip(self._checks, answers, strict=True) if wrong is not None}


async def _answer(check: Check) -> str | None:
    try:
        async with asyncio.timeout(CHECK_TIMEOUT_S):
            return await check()
    except TimeoutError:
        return f"no answer within {CHECK_TIMEOUT_S:g} s"
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def health_routes(health: Health) -> list[tuple[str, HttpHandler]]:
    @get(description="200 if the service is ready, 503 with what is missing if it is not")
    async def ready(scope: Scope) -> AsgiResponse:
        missing = await health.missing()
        status = {"status": "unavailable", "missing": missing} if missing else {"status": "ok"}
        return _json({**status, **health.facts()}, 503 if missing else 200)

    @get(description="200 as long as the process answers")
    async def live(scope: Scope) -> AsgiResponse:
        return _json({"status": "alive"}, 200)

    return [("/health", ready), ("/health/live", live)]


def _json(body: object, status: int) -> AsgiResponse:
    return AsgiResponse(msgspec.json.encode(body), status, {"Content-Type": "application/json"})
