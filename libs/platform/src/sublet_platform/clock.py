"""The clock of the wall."""

from __future__ import annotations

import time


class SystemClock:
    """See `ports.Clock`."""

    def now(self) -> float:
        return time.time()
