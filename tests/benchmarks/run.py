"""Measures a deployment that is up, beside the floor of its own broker and database, in one run.

    deploy/local bench [--only noop,chain] [--scale 0.5] [--slots 100] [--json FILE]

Prints a table, then one line of JSON. The addresses come from SUBLET_AMQP_URL and SUBLET_MONGO_URL. Machines are noisy:
compare the ratio to the floor, which is measured right before each workload, rather than the figures themselves.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS), str(TESTS.parent)]

from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from benchmarks import workloads  # noqa: E402
from benchmarks.costs import over_budget  # noqa: E402
from benchmarks.floor import STEPS, rate_and_latency  # noqa: E402
from benchmarks.measures import MEASURES  # noqa: E402
from sublet import UnknownWorkflowError  # noqa: E402

WORKER_START_TIMEOUT_S = 60.0


def main() -> int:
    arguments = _arguments()
    worker = _start_worker(arguments)
    try:
        report = asyncio.run(_measure(arguments))
    finally:
        worker.send_signal(signal.SIGTERM)
        worker.wait(timeout=30)
    _print(report)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(report, indent=1) + "\n")
    too_much = over_budget(report["figures"]["cost"]) if "cost" in report["figures"] else []
    for each in too_much:
        print(f"over the budget: {each}", file=sys.stderr)
    return 1 if too_much else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(MEASURES), help=f"some of {', '.join(MEASURES)}")
    parser.add_argument("--scale", type=float, default=1.0, help="of the number of runs")
    parser.add_argument("--slots", type=int, default=100, help="of the worker, ordinary and durable each")
    parser.add_argument("--json", help="also write the figures to this file")
    return parser.parse_args()


def _start_worker(arguments: argparse.Namespace) -> subprocess.Popen[bytes]:
    slots = str(arguments.slots)
    environment = {
        **os.environ,
        "PYTHONPATH": str(TESTS),
        "BENCH_SLOTS": slots,
        "BENCH_DURABLE_SLOTS": slots,
        "SUBLET_HTTP_PORT": "0",
        "SUBLET_LOG_LEVEL": "WARNING",
    }
    command = [str(Path(sys.executable).with_name("sublet-worker")), "benchmarks.workloads:worker"]
    return subprocess.Popen(command, env=environment)


async def _measure(arguments: argparse.Namespace) -> dict[str, Any]:
    amqp_url, mongo_url = os.environ["SUBLET_AMQP_URL"], os.environ["SUBLET_MONGO_URL"]
    await _until_worker_answers()
    figures = {}
    for name in arguments.only.split(","):
        print(f"measuring {name} …", file=sys.stderr, flush=True)
        floor = await rate_and_latency(amqp_url, mongo_url, name) if name in STEPS else {}
        figures[name] = {**await MEASURES[name](arguments.scale), **floor}
    machine = {"cpus": os.cpu_count(), "python": platform.python_version(), "machine": platform.machine()}
    return {"at": time.time(), "machine": machine, "slots": arguments.slots, "figures": figures}


async def _until_worker_answers() -> None:
    deadline = time.monotonic() + WORKER_START_TIMEOUT_S
    while True:
        try:
            await workloads.ready.aio_run()
        except UnknownWorkflowError:
            if time.monotonic() > deadline:
                raise
            await asyncio.sleep(0.5)
        else:
            return


def _print(report: dict[str, Any]) -> None:
    table = Table("workload", "figure", "Sublet", "floor", "ratio")
    for name, figures in report["figures"].items():
        for figure, value in figures.items():
            if figure.startswith("floor"):
                continue
            floor = _floor_of(figure, figures)
            ratio = f"{value / floor:.2f}" if floor else ""
            table.add_row(name, figure, f"{value:,.1f}", f"{floor:,.1f}" if floor else "", ratio)
    Console(stderr=True).print(table)
    print(json.dumps(report))


def _floor_of(figure: str, figures: dict[str, float]) -> float | None:
    if figure.endswith("_per_s") and figure != "tasks_per_s":
        return figures["floor_per_s"]
    return figures.get("floor_p50_ms") if figure.endswith("p50_ms") else None


if __name__ == "__main__":
    sys.exit(main())
