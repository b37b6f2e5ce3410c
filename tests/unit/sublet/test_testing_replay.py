"""`replay`: the current code against a durable log."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest

from sublet import Context, DurableContext, Standalone, Sublet
from sublet.testing import Divergence, SubletTestEnvironment, export_log, replay

sublet = Sublet()
called: list[str] = []


def charge(amount: int) -> str:
    called.append("charge")
    return f"charged {amount}"


@sublet.task(input_validator=dict)
async def pack(input: dict[str, Any], ctx: Context) -> dict[str, bool]:
    called.append("pack")
    return {"packed": True}


async def ship(input: dict[str, Any], ctx: DurableContext) -> dict[str, Any]:
    receipt = await ctx.aio_memo(charge, str, input["amount"])
    started = await ctx.aio_now()
    box, _ = await asyncio.gather(pack.aio_run({}), ctx.aio_sleep_for(timedelta(days=1)))
    await pack.aio_run({"again": True}, wait_for_result=False)
    paid = await ctx.aio_wait_for_event("paid")
    return {"receipt": receipt, "box": box, "paid": paid, "started": started.isoformat()}


def durable(fn: Callable[..., Any]) -> Standalone[Any, Any]:
    return sublet.durable_task(name="ship", input_validator=dict)(fn)


async def recorded(task: Standalone[Any, Any], *, paid: bool = True) -> dict[str, Any]:
    """The log of a run on input ``{"amount": 5}``; without ``paid`` it waits for its last event."""
    async with SubletTestEnvironment(sublet, [task, pack]) as env:
        ref = await task.aio_run({"amount": 5}, wait_for_result=False)
        await env.skip(days=2)
        if paid:
            await env.push("paid", {"sum": 5})
            await ref.aio_result()
        log = await env.log(ref)
    called.clear()
    return log


async def test_the_same_code_replays_without_running_children_or_memos() -> None:
    report = replay(await recorded(durable(ship)), durable(ship))
    assert report.ok
    assert (report.recorded, report.replayed, report.outcome) == (6, 6, "returned")
    assert called == []
    assert "OK, 6 of 6 recorded operations replayed; the code returned" in str(report)


async def test_the_log_of_a_waiting_run_replays_up_to_its_wait() -> None:
    report = replay(await recorded(durable(ship), paid=False), durable(ship))
    assert report.ok
    assert "waits for what the recorded run waited for" in str(report)


async def test_a_log_may_come_as_text_or_from_a_file(tmp_path: Path) -> None:
    log = await recorded(durable(ship))
    (tmp_path / "log.json").write_text(json.dumps(log))
    assert replay(json.dumps(log), durable(ship))
    assert replay(tmp_path / "log.json", durable(ship))


async def test_a_log_without_its_input_is_given_one() -> None:
    entries = {"entries": (await recorded(durable(ship)))["entries"]}
    assert replay(entries, durable(ship), input={"amount": 5})


async def test_a_divergence_names_the_operation_id_and_both_operations() -> None:
    async def changed(input: dict[str, Any], ctx: DurableContext) -> None:
        await ctx.aio_memo(charge, str, input["amount"] + 1)

    report = replay(await recorded(durable(ship)), durable(changed))
    assert not report
    assert report.divergence is not None
    assert report.divergence.node == "1"
    assert report.divergence.recorded == f"memo {__name__}.charge on [[5],{{}}]"
    assert report.divergence.asked == f"memo {__name__}.charge on [[6],{{}}]"
    assert "DIVERGES after 0 of 6" in str(report)
    assert called == []


async def test_a_missing_operation_is_a_divergence() -> None:
    async def shorter(input: dict[str, Any], ctx: DurableContext) -> None:
        await ctx.aio_memo(charge, str, input["amount"])

    report = replay(await recorded(durable(ship)), durable(shorter))
    assert report.divergence == Divergence("2", "memo now on []", None)
    assert "asked for:   nothing" in str(report)


async def test_an_operation_after_the_end_of_a_completed_run_is_a_divergence() -> None:
    async def longer(input: dict[str, Any], ctx: DurableContext) -> None:
        await ship(input, ctx)
        await ctx.aio_memo(charge, str, 1)

    report = replay(await recorded(durable(ship)), durable(longer))
    assert report.divergence is not None
    assert (report.divergence.recorded, report.divergence.node) == (None, "5")
    assert called == []


async def test_new_operations_after_the_log_of_a_waiting_run_are_no_divergence() -> None:
    log = await recorded(durable(ship))
    log["entries"] = log["entries"][:2]
    log["status"] = "EVICTED"
    report = replay(log, durable(ship))
    assert report.ok
    assert "goes on with run workflow 'pack'" in str(report)
    assert called == []


async def test_code_that_raises_although_the_recorded_run_completed_ended_otherwise() -> None:
    async def broken(input: dict[str, Any], ctx: DurableContext) -> None:
        await ship(input, ctx)
        raise KeyError("new bug")

    report = replay(await recorded(durable(ship)), durable(broken))
    assert report.ended_otherwise
    assert "raised KeyError: 'new bug'" in str(report)


async def test_the_client_is_refused_in_a_replay() -> None:
    async def talkative(input: dict[str, Any], ctx: DurableContext) -> None:
        await sublet.event.aio_push("hello", {})

    report = replay({"entries": []}, durable(talkative))
    assert "the client cannot be used" in str(report)


async def test_only_durable_tasks_have_logs() -> None:
    with pytest.raises(TypeError, match="not durable"):
        replay({"entries": []}, pack)
    with pytest.raises(msgspec.ValidationError):
        replay({"rows": []}, durable(ship))


async def test_logs_are_exported_by_any_client_and_of_any_task() -> None:
    workflow = sublet.workflow(name="parcel", input_validator=dict)

    @workflow.task()
    async def weigh(input: dict[str, Any], ctx: Context) -> dict[str, int]:
        return {"kg": 2}

    @workflow.durable_task(parents=[weigh])
    async def send(input: dict[str, Any], ctx: DurableContext) -> dict[str, int]:
        await ctx.aio_sleep_for(timedelta(hours=ctx.task_output(weigh)["kg"]))
        return {}

    async with SubletTestEnvironment(sublet, [workflow]) as env:
        ref = await workflow.aio_run({}, wait_for_result=False)
        await ref.aio_result()
        with pytest.raises(ValueError, match="weigh, send"):
            await env.log(ref)
        log = await env.log(ref, send)
        assert export_log(sublet, str(ref), "send") == log
    assert replay(log, send)
