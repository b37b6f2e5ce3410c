"""What ``sublet-worker acceptance.app:worker`` runs: those of the workflows under test that the environment names."""

from __future__ import annotations

import os

from acceptance import workflows


def _number(name: str) -> int | None:
    return int(os.environ[name]) if os.environ.get(name) else None


worker = workflows.client.worker(
    os.environ["SUBLET_TEST_WORKER"],
    slots=_number("SUBLET_TEST_SLOTS"),
    durable_slots=_number("SUBLET_TEST_DURABLE_SLOTS"),
    lifespan=getattr(workflows, os.environ.get("SUBLET_TEST_LIFESPAN", ""), None),
    workflows=[getattr(workflows, name) for name in os.environ["SUBLET_TEST_WORKFLOWS"].split(",")],
)
