"""Limits so small that a few runs reach all of them: pages of one item, caches of two, messages in several parts.

With the normal limits the code at a limit runs seldom, so that its bugs would stay hidden.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import ModuleType
from unittest.mock import patch

from sublet._durable import invocation
from sublet_engine.shard.deadlines import Deadlines
from sublet_event_ingest import ingest, sweeper
from sublet_platform.batching import BatchLoop
from sublet_platform.memory import stores
from sublet_protocol import limits
from sublet_timer import service as timer

TINY_LIMITS: dict[ModuleType, dict[str, float]] = {
    limits: {
        "BATCH_MAX_ITEMS": 2,
        "BATCH_MAX_BYTES": 600,
        "REPORT_MAX_BYTES": 40,
        "RUN_PREFETCH": 4,
        "EVENT_PREFETCH": 2,
        "MATCH_FIELD_SETS_MAX": 1,
        "RELEASED_MAX_PER_WORKER": 1,
        "RUN_CACHE_MAX": 1,
        "TICKET_REUSE_MAX": 2,
        "LOG_MAX_ENTRIES": 14,
        "LOG_WARN_ENTRIES": 7,
    },
    ingest: {"LOOK_BACK_PAGE": 2, "FIELD_SETS_CACHE_MAX": 1, "PUBLISH_MAX_BYTES": 300},
    sweeper: {"SWEEP_PAGE": 2},
    stores: {"_LIVE_CHUNK": 1},
    invocation: {"UNINTERRUPTED_RESULTS": 1},
    timer: {"HORIZON_S": 3.0, "HORIZON_CAPACITY": 2, "FIRE_MAX": 1},
}


@contextmanager
def tiny_limits() -> Iterator[None]:
    with ExitStack() as stack:
        for module, values in TINY_LIMITS.items():
            for name, value in values.items():
                stack.enter_context(patch.object(module, name, value))
        stack.enter_context(patch.dict(BatchLoop.__init__.__kwdefaults__, max_items=3, max_bytes=3_000))
        stack.enter_context(patch.object(Deadlines.__init__, "__defaults__", (2,)))
        yield
