"""The examples in virtual time. Durable tasks are evicted at every wait, so each wait is followed by a replay."""

from __future__ import annotations

import re
from datetime import timedelta
from pathlib import Path
from uuid import uuid4

import httpx
import pytest

from examples import agent, approval, fan_out, gpu_then_upload, saga, web_app
from sublet import FailedTaskRunExceptionGroup, TaskRunRef
from sublet.testing import SubletTestEnvironment

TASK_LOG = "sublet.task"


def log_lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What the tasks wrote by ``ctx.log``."""
    return [record.message for record in caplog.records if record.name == TASK_LOG]


def test_the_readme_lists_every_example() -> None:
    directory = Path(saga.__file__).parent
    listed = re.findall(r"^\| \[(\w+\.py)\]\(\1\) \|", (directory / "README.md").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(path.name for path in directory.glob("*.py"))


# --- approval -------------------------------------------------------------------------------------------------------

PURCHASE = approval.Purchase(item="A boat", approver="ann", manager="bo")


def approving() -> SubletTestEnvironment:
    return SubletTestEnvironment(approval.sublet, [approval.approval, approval.send_mail], always_evict=True)


async def ask() -> TaskRunRef[approval.Purchase, approval.Decision]:
    return await approval.approval.aio_run(PURCHASE, wait_for_result=False)


async def answer(env: SubletTestEnvironment, run: object, approved: object) -> None:
    await env.push("approval.answered", {"approved": approved}, scope=str(run))


@pytest.mark.parametrize(("approved", "outcome"), [(True, "approved"), (False, "rejected")])
async def test_a_purchase_is_decided_after_a_reminder(approved: bool, outcome: str) -> None:
    async with approving() as env:
        run = await ask()
        await env.skip(days=1.5)
        await answer(env, run, approved)
        assert (await run.aio_result()).model_dump() == {"outcome": outcome, "mails": 2}


async def test_a_purchase_that_nobody_decides_expires_after_a_mail_to_the_manager(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO", TASK_LOG)
    async with approving() as env:
        began = env.now
        assert (await (await ask()).aio_result()).model_dump() == {"outcome": "expired", "mails": 4}
        assert timedelta(days=4) <= env.now - began < timedelta(days=4, minutes=1)
    assert [line.split(":")[0] for line in log_lines(caplog)] == ["To ann", "To ann", "To ann", "To bo"]


async def test_an_answer_that_comes_while_a_mail_is_retried_counts() -> None:
    async with approving() as env:
        run = await ask()
        await env.skip(hours=23)
        env.fail_next(approval.send_mail, ConnectionError("the mail server is down"), times=3)
        await env.skip(hours=1)
        await answer(env, run, True)
        assert (await run.aio_result()).model_dump() == {"outcome": "approved", "mails": 2}


async def test_answers_to_other_runs_and_answers_without_a_decision_are_ignored() -> None:
    async with approving() as env:
        run, other = await ask(), await ask()
        await answer(env, run, "perhaps")
        await answer(env, other, True)
        await answer(env, run, False)
        assert (await run.aio_result()).outcome == "rejected"
        assert (await other.aio_result()).outcome == "approved"


# --- GPU, then upload -----------------------------------------------------------------------------------------------


async def test_the_next_clip_is_rendered_while_the_last_one_is_uploaded() -> None:
    render_clip = gpu_then_upload.render_clip
    clips = [gpu_then_upload.Clip(name=f"clip-{n}", gpu_s=60, upload_s=600) for n in range(4)]
    async with SubletTestEnvironment(
        gpu_then_upload.sublet, [render_clip], slots=1, lifespan=gpu_then_upload.load_model
    ) as env:
        began = env.now
        uploaded = await render_clip.aio_run_many([render_clip.create_bulk_run_item(clip) for clip in clips])
        took = env.now - began
    assert [each.url for each in uploaded] == [f"https://clips.example/clip-{n}?bytes=6" for n in range(4)]
    one_after_the_other, one_upload = timedelta(seconds=4 * 60), timedelta(seconds=600)
    assert one_after_the_other + one_upload <= took < one_after_the_other + one_upload + timedelta(seconds=1)


# --- agent ----------------------------------------------------------------------------------------------------------

GOAL = agent.Text(text="Book a flight to Oslo.")


def acting() -> SubletTestEnvironment:
    return SubletTestEnvironment(
        agent.sublet, [agent.agent, agent.think, agent.ask_human, agent.book_flight], always_evict=True
    )


async def runs_of(env: SubletTestEnvironment, task: str) -> list[str]:
    """The ids of its runs in the last days, the oldest first."""
    found = await agent.sublet.runs.aio_list(since=env.now - timedelta(days=10), workflow_ids=[task])
    return [run.metadata.id for run in reversed(found.rows)]


async def test_the_agent_asks_again_when_a_tool_fails() -> None:
    async with acting() as env:
        run = await agent.agent.aio_run(GOAL, wait_for_result=False)
        await env.skip(days=1)
        (first,) = await runs_of(env, "ask_human")
        await env.push("question.answered", {"text": "noon"}, scope=first)
        await env.skip(days=1)
        _, second = await runs_of(env, "ask_human")
        await env.push("question.answered", {"text": "evening"}, scope=second)
        assert (await run.aio_result()).text == "The evening flight is booked."


async def test_the_agent_decides_alone_when_no_answer_comes() -> None:
    async with acting() as env:
        began = env.now
        assert (await agent.agent.aio_run(GOAL)).text == "The morning flight is booked."
        assert env.now - began >= timedelta(days=3)


async def test_no_finished_model_call_is_repeated_when_calls_fail_and_a_worker_is_lost() -> None:
    async with acting() as env:
        env.fail_next(agent.think, ConnectionError("the model is overloaded"), times=2)
        env.kill_at_next(agent.book_flight)
        run = await agent.agent.aio_run(GOAL, wait_for_result=False)
        await env.skip(days=3.5)
        assert not env.workers[0].is_alive
        await env.start_worker()
        assert (await run.aio_result()).text == "The morning flight is booked."
        assert len(await runs_of(env, "think")) == 3


async def test_an_agent_that_makes_no_progress_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent, "MAX_STEPS", 2)
    async with acting():
        with pytest.raises(FailedTaskRunExceptionGroup, match="no result after 2 steps"):
            await agent.agent.aio_run(GOAL)


# --- web app --------------------------------------------------------------------------------------------------------


def selling() -> SubletTestEnvironment:
    return SubletTestEnvironment(web_app.sublet, [web_app.ship_when_paid], always_evict=True)


def browser() -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(web_app.app), base_url="http://shop")


async def order(http: httpx.AsyncClient) -> str:
    response = await http.post("/orders", json={"item": "book", "cents": 1200})
    assert response.status_code == 202
    order_id: str = response.json()["order_id"]
    return order_id


async def pay(http: httpx.AsyncClient, order_id: str, cents: int) -> None:
    response = await http.post("/webhooks/payments", json={"order_id": order_id, "cents": cents})
    assert response.status_code == 204


async def view(http: httpx.AsyncClient, order_id: str) -> tuple[str, object]:
    shown = (await http.get(f"/orders/{order_id}")).json()
    return shown["status"], shown["result"]


async def test_an_order_is_shipped_when_the_webhook_reports_the_whole_payment() -> None:
    async with selling() as env, browser() as http:
        order_id = await order(http)
        await pay(http, order_id, 1199)
        await env.skip(days=1)
        assert await view(http, order_id) == ("RUNNING", None)
        await pay(http, order_id, 1200)
        await env.skip(seconds=1)
        assert await view(http, order_id) == ("COMPLETED", {"outcome": "shipped"})


async def test_an_order_that_is_not_paid_is_cancelled() -> None:
    async with selling() as env, browser() as http:
        paid, unpaid = await order(http), await order(http)
        await pay(http, paid, 1200)
        await env.skip(days=15)
        assert await view(http, paid) == ("COMPLETED", {"outcome": "shipped"})
        assert await view(http, unpaid) == ("COMPLETED", {"outcome": "cancelled"})


async def test_a_payment_that_is_faster_than_the_worker_counts() -> None:
    async with selling() as env, browser() as http:
        await env.workers[0].stop()
        order_id = await order(http)
        await pay(http, order_id, 1200)
        await env.skip(hours=1)
        await env.start_worker()
        await env.skip(seconds=1)
        assert await view(http, order_id) == ("COMPLETED", {"outcome": "shipped"})


async def test_an_unknown_order_is_not_found() -> None:
    async with selling(), browser() as http:
        assert (await http.get(f"/orders/{uuid4()}")).status_code == 404


# --- fan out --------------------------------------------------------------------------------------------------------


def importing() -> SubletTestEnvironment:
    return SubletTestEnvironment(fan_out.sublet, [fan_out.import_file, fan_out.import_row], slots=5, always_evict=True)


async def test_the_report_counts_the_imported_rows_and_names_the_failed_ones() -> None:
    async with importing():
        rows = [f"article-{n},{n}" for n in range(1, 101)] + ["washer,many", "no quantity"]
        report = await fan_out.import_file.aio_run(fan_out.File(rows=rows))
    assert (report.imported, report.pieces) == (100, 5050)
    assert report.failed == ["row 101: 'many' is not a quantity", "row 102: '' is not a quantity"]


async def test_a_row_whose_import_fails_at_first_is_imported_by_a_retry() -> None:
    async with importing() as env:
        env.fail_next(fan_out.import_row, ConnectionError("the database is down"), times=5)
        report = await fan_out.import_file.aio_run(fan_out.File(rows=["bolt,1200", "nut,900"]))
    assert report == fan_out.Report(imported=2, pieces=2100, failed=[])


# --- saga -----------------------------------------------------------------------------------------------------------


def travelling() -> SubletTestEnvironment:
    return SubletTestEnvironment(saga.sublet, [saga.book_trip, saga.book, saga.cancel], always_evict=True)


async def test_a_trip_is_booked(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", TASK_LOG)
    async with travelling():
        outcome = await saga.book_trip.aio_run(saga.Trip(trip_id="1", city="Lisbon"))
    assert outcome == saga.Outcome(booked=list(saga.Service))
    assert log_lines(caplog) == ["Book a flight in Lisbon", "Book a hotel in Lisbon", "Book a car in Lisbon"]


async def test_a_trip_without_a_car_is_cancelled_in_reverse_order(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", TASK_LOG)
    async with travelling():
        outcome = await saga.book_trip.aio_run(saga.Trip(trip_id="2", city="Venice"))
    backwards = list(reversed(saga.Service))
    assert outcome == saga.Outcome(cancelled=backwards, reason="there are no cars in Venice")
    assert log_lines(caplog)[3:] == [
        "Cancel the car in Venice",
        "Cancel the hotel in Venice",
        "Cancel the flight in Venice",
    ]


async def test_a_cancellation_is_retried_until_the_provider_answers() -> None:
    async with travelling() as env:
        env.fail_next(saga.cancel, ConnectionError("the provider is down"), times=20)
        outcome = await saga.book_trip.aio_run(saga.Trip(trip_id="3", city="Venice"))
        assert len(outcome.cancelled) == 3
