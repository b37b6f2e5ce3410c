"""Shows in about a minute what Sublet does. Exit status 0 only if all that it claims came true.

Needs the services to run (``deploy/local up`` or ``docker compose up``) and, from the environment:

SUBLET_AMQP_URL                   where RabbitMQ is
SUBLET_SCHEDULER_METRICS_URLS     addresses of schedulers' /metrics, commas between (optional: shows slots and waits)
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import signal
import sys
from datetime import UTC, datetime, timedelta

# Names of its own, so that other workers, and what an interrupted demo left, have no part in this one.
# Set before the workflows are imported, which read it.
os.environ["SUBLET_NAMESPACE"] = f"demo{secrets.token_hex(2)}_"

from crew import Crew, WorkerFailed
from demo_workflows import WORKFLOWS, sublet
from rich.console import Console
from scenes import jobs, programme
from screen import Screen, outcome
from stage import Stage
from watching import Gauges, NothingThere, Wire

from sublet import BulkCancelReplayOpts, RunFilter, RunStatus, TransportUnavailable

GIVE_UP_TIMEOUT_S = 10.0


async def show(console: Console) -> bool:
    """Play everything; True if it all came true."""
    namespace = sublet.config.namespace
    urls = [url for url in os.environ.get("SUBLET_SCHEDULER_METRICS_URLS", "").split(",") if url]
    stage = Stage(programme(), jobs(), Crew(), Wire(sublet.config.amqp_url, namespace), Gauges(urls, namespace))
    watching = asyncio.create_task(stage.gauges.watch())
    try:
        await stage.wire.open()
        with Screen(stage, console):
            true = await stage.play_all()
        console.print(outcome(stage.scenes))
        return true
    except asyncio.CancelledError:
        await give_up_runs()
        raise
    finally:
        watching.cancel()
        await stage.crew.dismiss_all()
        await stage.wire.close()
        await sublet.aio_close()


async def give_up_runs() -> None:
    """Cancel what an interrupted demo leaves: nobody would run it any more."""
    unfinished = RunFilter(
        since=datetime.now(UTC) - timedelta(hours=1),
        statuses=[RunStatus.QUEUED, RunStatus.RUNNING],
        workflow_ids=list(WORKFLOWS),
    )
    with contextlib.suppress(TimeoutError, ValueError, TransportUnavailable):
        async with asyncio.timeout(GIVE_UP_TIMEOUT_S):
            await sublet.runs.aio_bulk_cancel(BulkCancelReplayOpts(filters=unfinished))


async def main() -> int:
    logging.getLogger("aiormq").setLevel(logging.CRITICAL)  # what goes wrong is said below, once
    loop, show_task = asyncio.get_running_loop(), asyncio.current_task()
    assert show_task is not None
    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(each, show_task.cancel)
    console = Console(width=None if sys.stdout.isatty() else 140)
    try:
        true = await show(console)
    except (NothingThere, WorkerFailed) as error:
        console.print(str(error), style="red", markup=False)
        return 1
    if not true:
        console.print("Not everything came true. The workers' logs are .sublet/logs/demo-*.log.", style="red")
        return 1
    console.print("Everything came true.", style="green")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(asyncio.run(main()))
    except asyncio.CancelledError:
        sys.exit(130)
