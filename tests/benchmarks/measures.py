"""The measurements. Each gives figures by name: ``…_per_s`` (throughput) and ``…_ms`` (latency, p50 and p99)."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

from benchmarks import workloads
from benchmarks.costs import cost
from benchmarks.floor import percentile
from sublet import BulkPushEventWithMetadata

Figures = dict[str, float]


def latencies(name: str, seconds: list[float]) -> Figures:
    return {f"{name}_p50_ms": percentile(seconds, 50) * 1e3, f"{name}_p99_ms": percentile(seconds, 99) * 1e3}


async def noop(scale: float) -> Figures:
    """Runs of one task that does nothing: many at once, then one after the other."""
    count = int(3_000 * scale)
    items = [workloads.noop.create_bulk_run_item(workloads.Number(n=n)) for n in range(count)]
    began = time.perf_counter()
    results = await workloads.noop.aio_run_many(items)
    took = time.perf_counter() - began
    assert [result.n for result in results] == list(range(count))
    singly = []
    for n in range(max(30, int(150 * scale))):
        began = time.perf_counter()
        await workloads.noop.aio_run(workloads.Number(n=n))
        singly.append(time.perf_counter() - began)
    return {"runs_per_s": count / took, **latencies("run", singly)}


async def chain(scale: float) -> Figures:
    """Runs of three tasks, each the parent of the next."""
    count = int(1_000 * scale)
    items = [workloads.chain.create_bulk_run_item(workloads.Number(n=n)) for n in range(count)]
    began = time.perf_counter()
    results = await workloads.chain.aio_run_many(items)
    took = time.perf_counter() - began
    assert all(result["third"]["n"] == n for n, result in enumerate(results))
    singly = []
    for n in range(max(20, int(60 * scale))):
        began = time.perf_counter()
        await workloads.chain.aio_run(workloads.Number(n=n))
        singly.append(time.perf_counter() - began)
    return {"runs_per_s": count / took, "tasks_per_s": 3 * count / took, **latencies("run", singly)}


async def event(scale: float) -> Figures:
    """Evicted tasks that wait for one event each: all events at once, then one after the other."""
    count = int(1_000 * scale)
    singles = max(30, int(60 * scale))
    items = [workloads.wake.create_bulk_run_item(workloads.Number(n=n)) for n in range(count + singles)]
    refs = await workloads.wake.aio_run_many(items, wait_for_result=False)
    await _until_waiting([ref.workflow_run_id for ref in refs])
    began = time.perf_counter()
    events = [_event(n) for n in range(count)]
    await workloads.client.event.aio_bulk_push(events)
    await asyncio.gather(*(ref.aio_result() for ref in refs[:count]))
    took = time.perf_counter() - began
    singly = []
    for n in range(count, count + singles):
        await workloads.client.event.aio_push("bench.wake", _event(n).payload)
        singly.append((await refs[n].aio_result())["latency_s"])
    return {"wakes_per_s": count / took, **latencies("wake", singly)}


def _event(n: int) -> BulkPushEventWithMetadata:
    return BulkPushEventWithMetadata(key="bench.wake", payload={"n": n, "sent_at": time.time()})


async def sleeper(scale: float) -> Figures:
    """Evicted sleeping tasks that are all due at the same time."""
    count = int(2_000 * scale)
    due = time.time() + 8 + count / 150
    items = [workloads.sleep_until.create_bulk_run_item(workloads.Moment(at=due)) for _ in range(count)]
    refs = await workloads.sleep_until.aio_run_many(items, wait_for_result=False)
    await _until_waiting([ref.workflow_run_id for ref in refs])
    if time.time() > due:
        raise RuntimeError("the sleepers were due before all of them slept: use a smaller --scale")
    results = await asyncio.gather(*(ref.aio_result() for ref in refs))
    late = [result["late_s"] for result in results]
    return {"drained_in_s": max(late), "wakes_per_s": count / max(late), **latencies("late", late)}


async def fan_out(scale: float) -> Figures:
    """A durable parent that waits for a thousand children."""
    count = int(1_000 * scale)
    took = []
    for _ in range(3):
        began = time.perf_counter()
        total = await workloads.fan_out.aio_run(workloads.Number(n=count))
        took.append(time.perf_counter() - began)
        assert total.n == sum(range(count))
    return {"children_per_s": count / percentile(took, 50), "took_s": percentile(took, 50)}


async def _until_waiting(run_ids: list[str]) -> None:
    """Wait until all these runs have been evicted."""
    for start in range(0, len(run_ids), 100):
        pending = set(run_ids[start : start + 100])
        while pending:
            details = await asyncio.gather(*(workloads.client.runs.aio_get_details(run) for run in pending))
            pending -= {each.external_id for each in details if any(t.is_evicted for t in each.task_runs.values())}


MEASURES: dict[str, Callable[[float], Awaitable[Figures]]] = {
    "noop": noop,
    "chain": chain,
    "event": event,
    "sleeper": sleeper,
    "fan-out": fan_out,
    "cost": cost,
}
