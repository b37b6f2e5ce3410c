"""SIGTERM and SIGINT: the first one begins a graceful stop, the second one ends the process at once."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Callable, Iterator

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


@contextlib.contextmanager
def stop_signals(begin_stop: Callable[[], None]) -> Iterator[None]:
    """Call ``begin_stop`` in the running event loop at the first signal."""
    loop = asyncio.get_running_loop()
    stopping = False

    def on_signal() -> None:
        nonlocal stopping
        if stopping:
            os._exit(1)
        stopping = True
        begin_stop()

    for each in STOP_SIGNALS:
        loop.add_signal_handler(each, on_signal)
    try:
        yield
    finally:
        for each in STOP_SIGNALS:
            loop.remove_signal_handler(each)
