"""Shows in about a minute what Sublet does. The exit status is 0 only if every check passed.

Needs the services to run (``deploy/local up`` or ``docker compose up``) and, from the environment:

SUBLET_AMQP_URL                   where RabbitMQ is
SUBLET_SCHEDULER_METRICS_URLS     /metrics addresses of schedulers, separated by commas (optional: shows slots, waits)
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

# A namespace of its own separates this demo from other workers and from runs that an interrupted demo left.
# It is set before the workflows are imported, because they read it.
os.environ["SUBLET_NAMESPACE"] = f"demo{secrets.token_hex(2)}_"

from demo_run import DemoRun
from demo_workflows import WORKFLOWS, sublet
from observers import AmqpObserver, Gauges, StackUnavailable
from rich.console import Console
from scenarios import scenarios, worker_roles
from terminal_view import TerminalView, results_table
from worker_processes import WorkerFailed, WorkerProcesses

from sublet import BulkCancelReplayOpts, RunFilter, RunStatus, TransportUnavailable

CANCEL_TIMEOUT_S = 10.0


async def show(console: Console) -> bool:
    """Run all scenarios. True if every check passed."""
    namespace = sublet.config.namespace
    urls = [url for url in os.environ.get("SUBLET_SCHEDULER_METRICS_URLS", "").split(",") if url]
    demo = DemoRun(
        scenarios(),
        worker_roles(),
        WorkerProcesses(),
        AmqpObserver(sublet.config.amqp_url, namespace),
        Gauges(urls, namespace),
    )
    watching = asyncio.create_task(demo.gauges.watch())
    try:
        await demo.amqp.open()
        with TerminalView(demo, console):
            passed = await demo.run_all()
        console.print(results_table(demo.scenarios))
        return passed
    except asyncio.CancelledError:
        await cancel_unfinished_runs()
        raise
    finally:
        watching.cancel()
        await demo.workers.stop_all()
        await demo.amqp.close()
        await sublet.aio_close()


async def cancel_unfinished_runs() -> None:
    """Cancel the unfinished runs of an interrupted demo, because no worker would run them any more."""
    unfinished = RunFilter(
        since=datetime.now(UTC) - timedelta(hours=1),
        statuses=[RunStatus.QUEUED, RunStatus.RUNNING],
        workflow_ids=list(WORKFLOWS),
    )
    with contextlib.suppress(TimeoutError, ValueError, TransportUnavailable):
        async with asyncio.timeout(CANCEL_TIMEOUT_S):
            await sublet.runs.aio_bulk_cancel(BulkCancelReplayOpts(filters=unfinished))


async def main() -> int:
    logging.getLogger("aiormq").setLevel(logging.CRITICAL)  # connection errors are reported below, once
    loop, show_task = asyncio.get_running_loop(), asyncio.current_task()
    assert show_task is not None
    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(each, show_task.cancel)
    console = Console(width=None if sys.stdout.isatty() else 140)
    try:
        passed = await show(console)
    except (StackUnavailable, WorkerFailed) as error:
        console.print(str(error), style="red", markup=False)
        return 1
    if not passed:
        console.print("Some checks failed. The logs of the workers are .sublet/logs/demo-*.log.", style="red")
        return 1
    console.print("All checks passed.", style="green")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(asyncio.run(main()))
    except asyncio.CancelledError:
        sys.exit(130)
