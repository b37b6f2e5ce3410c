"""The five scenarios of the demo. Each starts runs, observes them, and returns checks with figures."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

from demo_run import Check, DemoRun, Scenario
from demo_workflows import (
    APPROVED,
    CHARGE_DELAY,
    Book,
    Errand,
    FanOut,
    Nap,
    Order,
    Ran,
    Render,
    Written,
    book,
    errand,
    nap,
    order,
    render,
    sublet,
    sum_of_squares,
)
from polling import await_with_progress, most_concurrent, poll_until, slots_checks, span_s, tasks_of, workers_of
from worker_processes import WorkerProcess, WorkerRole

from sublet import RunStatus, TaskRunSummary

CHILDREN = 500
SLEEPERS = 100
NAP_S = 6.0
ERRANDS = 8
CHAPTERS = 8


def scenarios() -> list[Scenario]:
    return [
        Scenario("An order as a DAG: sleep, then approval by plain AMQP", run_order),
        Scenario(f"A durable fan-out: {CHILDREN} children on 5 slots", run_fan_out),
        Scenario(f"{SLEEPERS} sleepers on one durable slot", run_sleepers),
        Scenario("One slot, released explicitly: release_slot()", run_slot_release),
        Scenario("A worker killed while it runs tasks (kill -9)", run_killed_worker),
    ]


def worker_roles() -> list[WorkerRole]:
    return [
        WorkerRole("Ada", "shop", ("order",), slots=2),
        WorkerRole("Ben", "crowd", ("square", "sum_of_squares"), slots=5, durable_slots=1),
        WorkerRole("Cleo", "dormitory", ("nap",), durable_slots=1),
        WorkerRole("Dora", "studio", ("render",), slots=1),
        WorkerRole("Eve", "press", ("errand", "book"), slots=ERRANDS // 2, durable_slots=1),
        WorkerRole("Finn", "press", ("errand", "book"), slots=ERRANDS // 2, durable_slots=1),
    ]


# --- an order as a DAG ----------------------------------------------------------------------------------------------


async def run_order(demo: DemoRun) -> list[Check]:
    run = await order.aio_run(Order(order_id=42), wait_for_result=False)

    async def poll() -> dict[str, TaskRunSummary]:
        return await tasks_of(run.workflow_run_id)

    await poll_until(poll, lambda tasks: tasks["charge"].finished_at is not None, demo, show_tasks)
    demo.say(f"charged after its sleep; publishing {APPROVED} with approved=false by aio-pika")
    key = sublet.config.apply_namespace(APPROVED)
    await demo.amqp.publish_event(key, {"order_id": 42, "approved": False})
    await asyncio.sleep(1.0)
    refused = (await poll())["ship"]
    demo.say("and with approved=true")
    await demo.amqp.publish_event(key, {"order_id": 42, "approved": True})
    outputs = await run.aio_result()
    tasks = await poll()
    slept_s = span_s(tasks["reserve"].finished_at, tasks["charge"].started_at)
    worked_s = sum(span_s(task.started_at, task.finished_at) for task in tasks.values() if task.started_at)
    whole_s = span_s(tasks["reserve"].started_at, tasks["ship"].finished_at)
    delay_s = CHARGE_DELAY.total_seconds()
    return [
        Check("the order was shipped", f"{outputs['ship']}", outputs["ship"] == {"shipped": 42}),
        Check("the gift wrapping was skipped", f"{outputs['wrap']}", outputs["wrap"] == {"skipped": True}),
        Check(f"charge waited {delay_s:g} s", f"{slept_s:.2f} s", slept_s >= delay_s),
        Check("approved=false did not ship it", f"ship was {refused.status} then", refused.status is RunStatus.QUEUED),
        Check("waiting used no slot", f"{worked_s:.2f} s in slots, of {whole_s:.2f} s", worked_s < whole_s - delay_s),
    ]


def show_tasks(tasks: Mapping[str, TaskRunSummary]) -> str:
    return ", ".join(f"{name} {task.status.lower()}" for name, task in tasks.items())


# --- a durable fan-out ----------------------------------------------------------------------------------------------


async def run_fan_out(demo: DemoRun) -> list[Check]:
    def show() -> str:
        return f"{demo.amqp.notices['run.completed', 'square']} of {CHILDREN} children"

    total = await await_with_progress(sum_of_squares.aio_run(FanOut(children=CHILDREN)), demo, show)
    peak = most_concurrent((child.began_at, child.ended_at) for child in total.children)
    whole_s = max(child.ended_at for child in total.children) - min(child.began_at for child in total.children)
    evicted = demo.amqp.notices["task.evicted", "sum_of_squares"]
    return [
        Check(
            f"{CHILDREN} children gave the right sum",
            f"{len(total.children)} gave {total.value:,}",
            total.value == sum(n**2 for n in range(CHILDREN)),
        ),
        Check("never more than 5 at once", f"{peak} at once, {CHILDREN / whole_s:.0f} a second", peak <= 5),
        Check(
            "the parent held no slot meanwhile",
            f"evicted {evicted} times, invoked {total.invocations} times",
            evicted >= 1 and total.invocations >= 2,
        ),
        *slots_checks(demo, {("crowd", "task"): 5, ("crowd", "durable"): 1}),
    ]


# --- sleepers -------------------------------------------------------------------------------------------------------


async def run_sleepers(demo: DemoRun) -> list[Check]:
    def show() -> str:
        asleep, awake = (demo.amqp.notices[what, "nap"] for what in ("task.evicted", "run.completed"))
        return f"{asleep - awake} asleep without a slot, {awake} awake"

    items = [nap.create_bulk_run_item(Nap(seconds=NAP_S)) for _ in range(SLEEPERS)]
    naps = await await_with_progress(nap.aio_run_many(items), demo, show)
    peak = most_concurrent((each.asleep_at, each.awake_at) for each in naps)
    slept_s = [each.awake_at - each.asleep_at for each in naps]
    whole_s = max(each.awake_at for each in naps) - min(each.asleep_at for each in naps)
    return [
        Check(
            f"{SLEEPERS} slept {NAP_S:g} s each",
            f"{len(naps)} slept {min(slept_s):.2f} to {max(slept_s):.2f} s",
            len(naps) == SLEEPERS and min(slept_s) >= NAP_S,
        ),
        Check(
            "many at once on one slot", f"{peak} at once: {sum(slept_s):.0f} s of sleep in {whole_s:.1f} s", peak > 1
        ),
        *slots_checks(demo, {("dormitory", "durable"): 1}),
    ]


# --- a slot released explicitly -------------------------------------------------------------------------------------


async def run_slot_release(demo: DemoRun) -> list[Check]:
    compute_s, upload_s = 0.5, 2.5
    item = render.create_bulk_run_item(Render(compute_s=compute_s, upload_s=upload_s))
    demo.progress("two renderings need the only slot")
    first, second = sorted(await render.aio_run_many([item, item]), key=lambda each: each.began_at)
    return [
        Check(
            "the second rendering began when the first had released its slot",
            f"{(second.began_at - first.began_at) * 1000:.0f} ms after the first, which computed {compute_s:g} s",
            second.began_at >= first.began_at + compute_s,
        ),
        Check(
            "the first rendering continued without a slot",
            f"for another {first.ended_at - second.began_at:.2f} s",
            second.began_at < first.ended_at,
        ),
        *slots_checks(demo, {("studio", "task"): 1}),
    ]


# --- a killed worker ------------------------------------------------------------------------------------------------


async def run_killed_worker(demo: DemoRun) -> list[Check]:
    eve, finn = demo.workers.running["Eve"], demo.workers.running["Finn"]
    trips = [errand.create_bulk_run_item(Errand(seconds=4.0)) for _ in range(ERRANDS)]
    errands = await errand.aio_run_many(trips, wait_for_result=False)
    books = await book.aio_run_many([book.create_bulk_run_item(Book(chapters=CHAPTERS))] * 2, wait_for_result=False)
    run_ids = [run.workflow_run_id for run in errands] + [run.workflow_run_id for run in books]

    async def poll() -> dict[str, str | None]:
        return await workers_of(run_ids)

    workers = await poll_until(poll, lambda workers: None not in workers.values(), demo, show_workers)
    await asyncio.sleep(2.0)
    await demo.workers.kill(eve)
    killed_at_s = demo.elapsed_s
    demo.say(f"killed Eve (pid {eve.pid}) with kill -9")
    demo.progress("Finn takes over")
    ran = await asyncio.gather(*(run.aio_result() for run in errands))
    written = await asyncio.gather(*(run.aio_result() for run in books))
    took_s = demo.elapsed_s - killed_at_s
    held = [each for run, each in zip(errands, ran, strict=True) if workers[run.workflow_run_id] != id_of(finn, ran)]
    return [
        Check(
            "the other worker completed the tasks of the killed worker",
            f"{sum(each.pid == finn.pid for each in held)} of {len(held)} errands, {took_s:.1f} s later",
            bool(held) and all(each.pid == finn.pid for each in held),
        ),
        continued_book(written, eve, finn),
    ]


def continued_book(written: Sequence[Written], eve: WorkerProcess, finn: WorkerProcess) -> Check:
    pids = next(pids for pids in ([chapter.pid for chapter in each.chapters] for each in written) if pids[0] == eve.pid)
    by_eve = pids.count(eve.pid)
    return Check(
        "the durable task resumed where its log ended",
        f"chapters 1 to {by_eve} by the killed worker, {by_eve + 1} to {len(pids)} by the other",
        0 < by_eve < len(pids) and pids == [eve.pid] * by_eve + [finn.pid] * (len(pids) - by_eve),
    )


def id_of(worker: WorkerProcess, ran: Sequence[Ran]) -> str:
    """The id of a worker, from the outputs of its tasks."""
    return next(each.worker_id for each in ran if each.pid == worker.pid)


def show_workers(workers: Mapping[str, str | None]) -> str:
    return f"{sum(worker is not None for worker in workers.values())} of {len(workers)} tasks are running"
