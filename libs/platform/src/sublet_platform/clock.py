"""The wall clock."""

from __future__ import annotations

import time


class SystemClock:
    """See `ports.Clock`."""

    def now(self) -> float:
        return time.time()
