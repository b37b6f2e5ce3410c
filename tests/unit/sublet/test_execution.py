"""Ordinary tasks on a worker: outputs, failures, cancellation, timeouts, and the context."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncGenerator
from typing import Any

import msgspec
import pytest
from pydantic import BaseModel

from sublet._declare.types import EmptyModel
from sublet._errors import LifespanSetupError, LoopAlreadyRunningError, NonRetryableException, TaskRunError
from sublet._worker.context import Context, current_context
from sublet._worker.worker import Worker, WorkerStatus
from sublet_protocol import limits
from sublet_protocol.messages import (
    CancelRun,
    Failed,
    Finished,
    Grant,
    ParentLink,
    Ping,
    Revoked,
    TaskError,
    TimeoutExtended,
    Trigger,
)
from sublet_protocol.raw_json import NULL
from support.virtual_time import in_virtual_time
from support.worker_harness import BenchTransport, WorkerHarness, client


async def test_sync_and_async_functions_give_their_outputs() -> None:
    class Order(BaseModel):
        number: int

    threads: list[threading.Thread] = []

    @client.task(name="double", input_validator=Order)
    def double(input: Order, ctx: Context) -> dict[str, int]:
        threads.append(threading.current_thread())
        return {"number": input.number * 2}

    @client.task(name="halve", input_validator=Order)
    async def halve(input: Order, ctx: Context) -> Order:
        return Order(number=input.number // 2)

    async with WorkerHarness(double, halve) as bench:
        bench.run(double, input=msgspec.Raw(b'{"number":"21"}'))
        assert await bench.finished(1) == {"number": 42}
        assert threads[0] is not threading.main_thread()
        bench.run(halve, input=msgspec.Raw(b'{"number":10}'))
        assert await bench.finished(2) == {"number": 5}


async def test_the_current_context_is_known_in_async_code_in_threads_and_nowhere_else() -> None:
    seen: list[object] = []

    @client.task(name="sync")
    def sync(input: EmptyModel, ctx: Context) -> None:
        seen.append(current_context.get() is ctx)

    @client.task(name="coroutine")
    async def coroutine(input: EmptyModel, ctx: Context) -> None:
        seen.append(current_context.get() is ctx)
        seen.append(await asyncio.to_thread(lambda: current_context.get() is ctx))

    async with WorkerHarness(sync, coroutine) as bench:
        bench.run(sync)
        bench.run(coroutine)
        await bench.until(lambda: len(bench.of(Finished)) == 2)
        assert seen == [True, True, True]
        assert current_context.get() is None


async def test_no_output_is_null() -> None:
    @client.task(name="silent")
    async def silent(input: EmptyModel, ctx: Context) -> None: ...

    async with WorkerHarness(silent) as bench:
        bench.run(silent)
        await bench.finished()
        assert bench.of(Finished)[0].output == NULL


@pytest.mark.parametrize(
    ("error", "retryable"),
    [
        (ValueError("no luck"), True),
        (NonRetryableException("no luck"), False),
        (SystemExit("no luck"), True),
        (asyncio.CancelledError("no luck"), True),
    ],
)
async def test_an_exception_of_the_task_is_reported_as_failed(error: BaseException, retryable: bool) -> None:
    @client.task(name="failing")
    async def failing(input: EmptyModel, ctx: Context) -> None:
        raise error

    async with WorkerHarness(failing) as bench:
        bench.run(failing)
        failed = await bench.failed()
        assert (failed.error.type, failed.error.message) == (type(error).__name__, "no luck")
        assert failed.retryable is retryable
        assert "test_execution.py" in failed.error.trace
        assert failed.error.task_run_id == "run.failing"


async def test_the_error_of_a_child_keeps_its_type_and_long_texts_are_cut() -> None:
    @client.task(name="failing")
    async def failing(input: EmptyModel, ctx: Context) -> None:
        raise TaskRunError("x" * 1_000_000, "KeyError", "y" * 1_000_000)

    async with WorkerHarness(failing) as bench:
        bench.run(failing)
        error = (await bench.failed()).error
        assert error.type == "KeyError"
        assert (len(error.message), len(error.trace)) == (limits.ERROR_TEXT_MAX_CHARS,) * 2


async def test_an_output_that_cannot_be_stored_and_an_input_that_does_not_fit_are_failures() -> None:
    class Order(BaseModel):
        number: int

    @client.task(name="odd")
    async def odd(input: EmptyModel, ctx: Context) -> Any:
        return 7

    @client.task(name="strict", input_validator=Order)
    async def strict(input: Order, ctx: Context) -> None: ...

    async with WorkerHarness(odd, strict) as bench:
        bench.run(odd)
        bench.run(strict)
        await bench.until(lambda: len(bench.of(Failed)) == 2)
        assert {failed.error.type for failed in bench.of(Failed)} == {"IllegalTaskOutputError", "ValidationError"}


@in_virtual_time
async def test_a_task_that_takes_too_long_fails_and_is_cancelled() -> None:
    ended: list[str] = []

    @client.task(name="slow")
    async def slow(input: EmptyModel, ctx: Context) -> None:
        try:
            await asyncio.sleep(1_000)
        finally:
            ended.append("cancelled" if ctx.is_cancelled else "not told")

    async with WorkerHarness(slow) as bench:
        bench.run(slow, timeout_s=2.0)
        failed = await bench.failed()
        assert failed.error.type == "TimeoutError"
        assert failed.error.message == "Task exceeded timeout of 2 s"
        assert failed.retryable
        await bench.until(lambda: ended)
        assert ended == ["cancelled"]
        assert len(bench.reports) == 1


@in_virtual_time
async def test_refresh_timeout_extends_the_execution_timeout() -> None:
    @client.task(name="slow")
    async def slow(input: EmptyModel, ctx: Context) -> None:
        await ctx.aio_refresh_timeout("10s")
        ctx.refresh_timeout("1s")
        await asyncio.sleep(12)

    async with WorkerHarness(slow) as bench:
        bench.run(slow, timeout_s=2.0)
        await bench.finished()
        assert [(e.by_s, e.number) for e in bench.of(TimeoutExtended)] == [(10.0, 1), (1.0, 2)]


async def test_the_late_result_of_a_thread_that_took_too_long_is_ignored() -> None:
    resume = threading.Event()
    told: list[bool] = []

    @client.task(name="blocking")
    def blocking(input: EmptyModel, ctx: Context) -> dict[str, Any]:
        resume.wait(20)
        told.append(ctx.is_cancelled)
        return {"late": True}

    async with WorkerHarness(blocking) as bench:
        bench.run(blocking, timeout_s=0.05)
        await bench.failed()
        resume.set()
        await bench.until(lambda: told)
        await bench.settled()
        assert told == [True]
        assert not bench.of(Finished)


@in_virtual_time
async def test_a_revoked_task_sees_is_cancelled_before_it_is_cancelled_and_frees_its_slot() -> None:
    steps: list[tuple[str, bool]] = []

    @client.task(name="endless")
    async def endless(input: EmptyModel, ctx: Context) -> None:
        try:
            await asyncio.sleep(1_000)
        except asyncio.CancelledError:
            steps.append(("cancelled", ctx.is_cancelled))
            raise

    async with WorkerHarness(endless) as bench:
        task_run = bench.run(endless)
        await bench.until(lambda: bench.worker.held)
        bench.transport.say(Revoked(bench.lease(task_run), "cancelled"))
        await bench.settled()
        assert steps == []
        assert bench.worker.held == {"running": 1}
        bench.transport.say(Ping())
        await bench.settled()
        assert bench.heartbeats[-1].leases == ()
        await bench.until(lambda: bench.transport.acked)
        assert steps == [("cancelled", True)]
        assert bench.reports == []


async def test_a_revoked_task_that_returns_is_not_reported() -> None:
    @client.task(name="watchful")
    async def watchful(input: EmptyModel, ctx: Context) -> dict[str, Any]:
        while not ctx.is_cancelled:  # noqa: ASYNC110 - as users write it
            await asyncio.sleep(0.01)
        return {"stopped": True}

    async with WorkerHarness(watchful) as bench:
        task_run = bench.run(watchful)
        await bench.until(lambda: bench.worker.held)
        bench.transport.say(Revoked(bench.lease(task_run), "superseded"))
        await bench.until(lambda: bench.transport.acked)
        assert bench.reports == []


async def test_a_task_can_cancel_itself() -> None:
    @client.task(name="resigning")
    async def resigning(input: EmptyModel, ctx: Context) -> None:
        await ctx.aio_cancel()

    async with WorkerHarness(resigning) as bench:
        bench.run(resigning)
        await bench.finished()
        assert bench.of(CancelRun) == [CancelRun("run", "run.resigning")]


async def test_the_context_has_the_ids_and_options_of_the_task() -> None:
    told: dict[str, Any] = {
        "workflow_run_id": "run",
        "task_run_id": "run.curious",
        "workflow_id": "curious",
        "workflow_name": "curious",
        "workflow_version_id": "v",
        "task_name": "curious",
        "worker_labels": {"zone": "a"},
        "retry_count": 2,
        "attempt_number": 3,
        "max_attempts": 4,
        "additional_metadata": {"tenant": "x"},
        "priority": 3,
        "parent_workflow_run_id": "parent",
        "child_index": 4,
        "child_key": "k",
        "was_triggered_by_event": True,
        "triggering_event_id": "event-1",
        "triggering_event_key": "order.paid",
        "filter_payload": {"limit": 1},
        "is_durable": False,
    }
    seen: dict[str, Any] = {}

    @client.task(name="curious", retries=3)
    async def curious(input: EmptyModel, ctx: Context) -> None:
        seen.update({name: getattr(ctx, name) for name in told}, worker_id=ctx.worker_id)

    async with WorkerHarness(curious, labels={"zone": "a"}) as bench:
        bench.run(
            curious,
            retry_count=2,
            metadata={"tenant": "x"},
            priority=3,
            parent=ParentLink("parent.step"),
            child_index=4,
            child_key="k",
            trigger=Trigger("event-1", "order.paid", {"limit": 1}),
        )
        await bench.finished()
        assert seen == {**told, "worker_id": bench.worker.id}


def test_the_context_has_outputs_and_errors_of_other_tasks() -> None:
    dag = client.workflow(name="dag")

    @dag.task()
    async def first(input: EmptyModel, ctx: Context) -> dict[str, int]:
        return {}

    @dag.task()
    async def skipped(input: EmptyModel, ctx: Context) -> dict[str, int]:
        return {}

    @dag.task(parents=[first, skipped])
    async def last(input: EmptyModel, ctx: Context) -> None: ...

    grant = Grant(
        ticket="t",
        lease="run.last@1",
        workflow="dag",
        version="v",
        task="last",
        input=msgspec.Raw(b"{}"),
        retry_count=0,
        invocation=1,
        timeout_s=1.0,
        parents={"first": msgspec.Raw(b'{"n":1}')},
        skipped=("skipped",),
        errors={"first": TaskError("ValueError", "no luck", "trace", "run.first")},
    )
    ctx = Context(grant, last, services=None)  # type: ignore[arg-type]
    assert ctx.task_output(first) == {"n": 1}
    assert ctx.was_skipped(skipped)
    with pytest.raises(ValueError, match="was skipped"):
        ctx.task_output(skipped)
    with pytest.raises(ValueError, match="none of the parents"):
        ctx.task_output(last)
    assert ctx.task_run_errors == {"first": "ValueError: no luck\ntrace"}
    error = ctx.get_task_run_error(first)
    assert error is not None
    assert (error.exc_type, error.task_run_external_id) == ("ValueError", "run.first")
    assert ctx.get_task_run_error(skipped) is None
    assert [ctx._next_child_index() for _ in range(3)] == [0, 1, 2]


async def test_log_lines_carry_the_ids_of_run_and_task(caplog: pytest.LogCaptureFixture) -> None:
    @client.task(name="talking")
    async def talking(input: EmptyModel, ctx: Context) -> None:
        ctx.log("hello")
        await ctx.aio_log({"step": 2})
        ctx.log({"odd": object()})
        with pytest.raises(TypeError):
            ctx.log({"odd": object()}, raise_on_error=True)

    caplog.set_level(logging.INFO, logger="sublet.task")
    async with WorkerHarness(talking) as bench:
        bench.run(talking)
        await bench.finished()
    records = [record for record in caplog.records if record.name == "sublet.task"]
    assert [record.getMessage() for record in records[:2]] == ["hello", '{"step":2}']
    assert records[0].__dict__["task_run_id"] == "run.talking"


async def test_the_lifespan_yields_its_value_and_ends_after_the_last_task() -> None:
    steps: list[str] = []

    async def lifespan() -> AsyncGenerator[str, None]:
        steps.append("begin")
        yield "pool"
        steps.append("end")

    @client.task(name="using")
    async def using(input: EmptyModel, ctx: Context) -> None:
        await asyncio.sleep(0.05)
        steps.append(ctx.lifespan)

    bench = WorkerHarness(using, lifespan=lifespan)
    await bench.worker.aio_start()
    bench.run(using)
    await bench.until(lambda: bench.worker.held)
    await bench.worker.stop()
    assert steps == ["begin", "pool", "end"]


async def test_a_failed_lifespan_stops_the_start_of_the_worker() -> None:
    async def lifespan() -> AsyncGenerator[None, None]:
        raise RuntimeError("no database")
        yield

    @client.task(name="using")
    async def using(input: EmptyModel, ctx: Context) -> None: ...

    bench = WorkerHarness(using, lifespan=lifespan)
    with pytest.raises(LifespanSetupError, match="no database"):
        await bench.worker.aio_start()
    assert bench.worker.status is WorkerStatus.STOPPED


def test_a_worker_has_slots_only_of_the_kinds_that_it_needs() -> None:
    @client.task(name="ordinary")
    async def ordinary(input: EmptyModel, ctx: Context) -> None: ...

    @client.durable_task(name="lasting")
    async def lasting(input: EmptyModel, ctx: Any) -> None: ...

    def worker(**options: Any) -> Worker:
        return Worker("w", client.config, transport=BenchTransport(), **options)

    assert (worker(workflows=[ordinary]).slots, worker(workflows=[ordinary]).durable_slots) == (100, 0)
    assert (worker(workflows=[lasting]).slots, worker(workflows=[lasting]).durable_slots) == (0, 1_000)
    both = worker(workflows=[ordinary, lasting], slots=5, durable_slots=7)
    assert (both.slots, both.durable_slots) == (5, 7)
    assert both.pool != worker(workflows=[ordinary]).pool
    assert both.pool == worker(workflows=[lasting, ordinary]).pool
    with pytest.raises(TypeError, match="register the workflow 'ordinary' itself"):
        worker(workflows=[ordinary.task])
    with pytest.raises(TypeError, match="workflows and standalone tasks"):
        worker(workflows=["ordinary"])
    with pytest.raises(ValueError, match="from 1"):
        worker(workflows=[ordinary], slots=0)
    with pytest.raises(ValueError, match="no durable task"):
        _ = worker(workflows=[ordinary], durable_slots=3).durable_slots
    with pytest.raises(ValueError, match="has no tasks"):
        worker(workflows=[client.workflow(name="empty")])


async def test_start_refuses_to_block_an_event_loop_and_a_worker_without_work_to_start() -> None:
    worker = Worker("w", client.config, transport=BenchTransport())
    with pytest.raises(LoopAlreadyRunningError):
        worker.start()
    with pytest.raises(ValueError, match="nothing to run"):
        await worker.aio_start()
