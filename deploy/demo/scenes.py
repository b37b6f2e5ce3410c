"""The five scenes of the demo. Each plays, looks at what happens, and returns what it can prove."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

from crew import Job, Member
from demo_workflows import (
    APPROVED,
    CHARGE_DELAY,
    Book,
    FanOut,
    Nap,
    Order,
    PendingSend,
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
from looking import most_at_once, span_s, tasks_of, until, watched, within_slots, workers_of
from stage import Fact, Scene, Stage

from sublet import RunStatus, TaskRunSummary

CHILDREN = 500
SLEEPERS = 100
NAP_S = 6.0
ERRANDS = 8
CHAPTERS = 8


def programme() -> list[Scene]:
    return [
        Scene("An order as a DAG: sleep, then approval by plain AMQP", play_order),
        Scene(f"A durable fan-out: {CHILDREN} children on 5 slots", play_fan_out),
        Scene(f"{SLEEPERS} sleepers on one durable slot", play_sleepers),
        Scene("The only slot given away by hand: release_slot()", play_release),
        Scene("A worker killed at work (kill -9)", play_killed_worker),
    ]


def jobs() -> list[Job]:
    return [
        Job("Ada", "shop", ("order",), slots=2),
        Job("Ben", "crowd", ("square", "sum_of_squares"), slots=5, durable_slots=1),
        Job("Cleo", "dormitory", ("nap",), durable_slots=1),
        Job("Dora", "studio", ("render",), slots=1),
        Job("Eve", "press", ("errand", "book"), slots=ERRANDS // 2, durable_slots=1),
        Job("Finn", "press", ("errand", "book"), slots=ERRANDS // 2, durable_slots=1),
    ]


# --- an order as a DAG ----------------------------------------------------------------------------------------------


async def play_order(stage: Stage) -> list[Fact]:
    run = await order.aio_run(Order(order_id=42), wait_for_result=False)

    async def look() -> dict[str, TaskRunSummary]:
        return await tasks_of(run.workflow_run_id)

    await until(look, lambda tasks: tasks["charge"].finished_at is not None, stage, show_tasks)
    stage.say(f"charged after its sleep; publishing {APPROVED} with approved=false by aio-pika")
    key = sublet.config.apply_namespace(APPROVED)
    await stage.wire.publish_event(key, {"order_id": 42, "approved": False})
    await asyncio.sleep(1.0)
    refused = (await look())["ship"]
    stage.say("and with approved=true")
    await stage.wire.publish_event(key, {"order_id": 42, "approved": True})
    outputs = await run.aio_result()
    tasks = await look()
    slept_s = span_s(tasks["reserve"].finished_at, tasks["charge"].started_at)
    worked_s = sum(span_s(task.started_at, task.finished_at) for task in tasks.values() if task.started_at)
    whole_s = span_s(tasks["reserve"].started_at, tasks["ship"].finished_at)
    delay_s = CHARGE_DELAY.total_seconds()
    return [
        Fact("the order was shipped", f"{outputs['ship']}", outputs["ship"] == {"shipped": 42}),
        Fact("the gift wrapping was skipped", f"{outputs['wrap']}", outputs["wrap"] == {"skipped": True}),
        Fact(f"charge waited {delay_s:g} s", f"{slept_s:.2f} s", slept_s >= delay_s),
        Fact("approved=false did not ship it", f"ship was {refused.status} then", refused.status is RunStatus.QUEUED),
        Fact("waiting took no slot", f"{worked_s:.2f} s in slots, of {whole_s:.2f} s", worked_s < whole_s - delay_s),
    ]


def show_tasks(tasks: Mapping[str, TaskRunSummary]) -> str:
    return ", ".join(f"{name} {task.status.lower()}" for name, task in tasks.items())


# --- a durable fan-out ----------------------------------------------------------------------------------------------


async def play_fan_out(stage: Stage) -> list[Fact]:
    def show() -> str:
        return f"{stage.wire.notices['run.completed', 'square']} of {CHILDREN} children"

    total = await watched(sum_of_squares.aio_run(FanOut(children=CHILDREN)), stage, show)
    peak = most_at_once((child.began_at, child.ended_at) for child in total.children)
    whole_s = max(child.ended_at for child in total.children) - min(child.began_at for child in total.children)
    evicted = stage.wire.notices["task.evicted", "sum_of_squares"]
    return [
        Fact(
            f"{CHILDREN} children gave the right sum",
            f"{len(total.children)} gave {total.value:,}",
            total.value == sum(n**2 for n in range(CHILDREN)),
        ),
        Fact("never more than 5 at once", f"{peak} at once, {CHILDREN / whole_s:.0f} a second", peak <= 5),
        Fact(
            "meanwhile their parent was off its slot",
            f"evicted {evicted} x, begun {total.invocations} x",
            evicted >= 1 and total.invocations >= 2,
        ),
        *within_slots(stage, {("crowd", "task"): 5, ("crowd", "durable"): 1}),
    ]


# --- sleepers -------------------------------------------------------------------------------------------------------


async def play_sleepers(stage: Stage) -> list[Fact]:
    def show() -> str:
        asleep, awake = (stage.wire.notices[what, "nap"] for what in ("task.evicted", "run.completed"))
        return f"{asleep - awake} asleep without a slot, {awake} awake again"

    items = [nap.create_bulk_run_item(Nap(seconds=NAP_S)) for _ in range(SLEEPERS)]
    naps = await watched(nap.aio_run_many(items), stage, show)
    peak = most_at_once((each.asleep_at, each.awake_at) for each in naps)
    slept_s = [each.awake_at - each.asleep_at for each in naps]
    whole_s = max(each.awake_at for each in naps) - min(each.asleep_at for each in naps)
    return [
        Fact(
            f"{SLEEPERS} slept {NAP_S:g} s each",
            f"{len(naps)} slept {min(slept_s):.2f} to {max(slept_s):.2f} s",
            len(naps) == SLEEPERS and min(slept_s) >= NAP_S,
        ),
        Fact("many at once on one slot", f"{peak} at once: {sum(slept_s):.0f} s of sleep in {whole_s:.1f} s", peak > 1),
        *within_slots(stage, {("dormitory", "durable"): 1}),
    ]


# --- a slot given away by hand --------------------------------------------------------------------------------------


async def play_release(stage: Stage) -> list[Fact]:
    compute_s, upload_s = 0.5, 2.5
    item = render.create_bulk_run_item(Render(compute_s=compute_s, upload_s=upload_s))
    stage.progress("two renderings want the only slot")
    first, second = sorted(await render.aio_run_many([item, item]), key=lambda each: each.began_at)
    return [
        Fact(
            "the second began once the first had given its slot away",
            f"{(second.began_at - first.began_at) * 1000:.0f} ms after it, which computed {compute_s * 1000:.0f} ms",
            second.began_at >= first.began_at + compute_s,
        ),
        Fact(
            "while the first went on",
            f"for another {first.ended_at - second.began_at:.2f} s",
            second.began_at < first.ended_at,
        ),
        *within_slots(stage, {("studio", "task"): 1}),
    ]


# --- a killed worker ------------------------------------------------------------------------------------------------


async def play_killed_worker(stage: Stage) -> list[Fact]:
    eve, finn = stage.crew.members["Eve"], stage.crew.members["Finn"]
    trips = [errand.create_bulk_run_item(PendingSend(seconds=4.0)) for _ in range(ERRANDS)]
    errands = await errand.aio_run_many(trips, wait_for_result=False)
    books = await book.aio_run_many([book.create_bulk_run_item(Book(chapters=CHAPTERS))] * 2, wait_for_result=False)
    run_ids = [run.workflow_run_id for run in errands] + [run.workflow_run_id for run in books]

    async def look() -> dict[str, str | None]:
        return await workers_of(run_ids)

    workers = await until(look, lambda workers: None not in workers.values(), stage, show_workers)
    await asyncio.sleep(2.0)
    await stage.crew.kill(eve)
    killed_at_s = stage.elapsed_s
    stage.say(f"killed Eve (pid {eve.pid}) with kill -9")
    stage.progress("Finn carries on")
    ran = await asyncio.gather(*(run.aio_result() for run in errands))
    written = await asyncio.gather(*(run.aio_result() for run in books))
    took_s = stage.elapsed_s - killed_at_s
    held = [each for run, each in zip(errands, ran, strict=True) if workers[run.workflow_run_id] != id_of(finn, ran)]
    return [
        Fact(
            "what the killed worker had in hand was done by the other",
            f"{sum(each.pid == finn.pid for each in held)} of {len(held)} errands, all over {took_s:.1f} s later",
            bool(held) and all(each.pid == finn.pid for each in held),
        ),
        begun_book_fact(written, eve, finn),
    ]


def begun_book_fact(written: Sequence[Written], eve: Member, finn: Member) -> Fact:
    pids = next(pids for pids in ([chapter.pid for chapter in each.chapters] for each in written) if pids[0] == eve.pid)
    by_eve = pids.count(eve.pid)
    return Fact(
        "the durable task went on where its log ended",
        f"chapters 1 to {by_eve} by the killed worker, {by_eve + 1} to {len(pids)} by the other",
        0 < by_eve < len(pids) and pids == [eve.pid] * by_eve + [finn.pid] * (len(pids) - by_eve),
    )


def id_of(member: Member, ran: Sequence[Ran]) -> str:
    """The id of a worker, from what its tasks returned."""
    return next(each.worker_id for each in ran if each.pid == member.pid)


def show_workers(workers: Mapping[str, str | None]) -> str:
    return f"{sum(worker is not None for worker in workers.values())} of {len(workers)} tasks run"
