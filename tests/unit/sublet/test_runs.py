"""Running workflows: requests, results and children."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import msgspec
import pytest
from pydantic import BaseModel

from sublet import (
    ClientConfig,
    FailedTaskRunExceptionGroup,
    Priority,
    RunCancelledError,
    RunNotFoundError,
    Standalone,
    Sublet,
    TaskRunError,
    TriggerWorkflowOptions,
    UnknownWorkflowError,
)
from sublet._durable.context import DurableContext
from sublet._worker.context import ChildSpawn, current_context
from sublet_protocol import ids, limits
from sublet_protocol.messages import ParentLink, Record, RunRequest, RunResult, TaskError, WatchRun
from sublet_protocol.topology import run_key
from support.fake_transport import client, completed, echo, silent


class Number(BaseModel):
    x: int


def double(input: Number, ctx: Any) -> Number: ...  # type: ignore[empty-body]


def echo_task(sublet: Sublet, **options: Any) -> Standalone[Number, Number]:
    """The fake broker gives every task its own input back."""
    return sublet.task(name="Double", input_validator=Number, **options)(double)


@pytest.fixture
def sublet() -> Iterator[Sublet]:
    made, _ = client(echo)
    yield made
    made.close()


@contextlib.contextmanager
def closing(sublet: Sublet) -> Iterator[Sublet]:
    yield sublet
    sublet.close()


# --- the four ways ---------------------------------------------------------------------------------------------------


def test_run_blocks_for_the_typed_result(sublet: Sublet) -> None:
    assert echo_task(sublet).run(Number(x=2)) == Number(x=2)


async def test_aio_run_awaits_the_typed_result(sublet: Sublet) -> None:
    assert await echo_task(sublet).aio_run(Number(x=2)) == Number(x=2)


async def test_run_works_where_an_event_loop_runs(sublet: Sublet) -> None:
    assert echo_task(sublet).run(Number(x=2)) == Number(x=2)


def test_one_client_serves_many_threads_and_loops(sublet: Sublet) -> None:
    task = echo_task(sublet)

    def in_thread(n: int) -> int:
        return task.run(Number(x=n)).x if n % 2 else asyncio.run(task.aio_run(Number(x=n))).x

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert list(pool.map(in_thread, range(40))) == list(range(40))


def test_run_many_keeps_the_order_of_its_items(sublet: Sublet) -> None:
    task = echo_task(sublet)
    items = [task.create_bulk_run_item(Number(x=n)) for n in range(200)]
    assert [number.x for number in task.run_many(items)] == list(range(200))


async def test_aio_run_many_keeps_the_order_of_its_items(sublet: Sublet) -> None:
    task = echo_task(sublet)
    items = [task.create_bulk_run_item(Number(x=n)) for n in range(200)]
    assert [number.x for number in await task.aio_run_many(items)] == list(range(200))


def test_run_many_of_nothing_is_nothing(sublet: Sublet) -> None:
    assert echo_task(sublet).run_many([]) == []


async def test_without_background_everything_runs_on_the_callers_loop() -> None:
    sublet, broker = client(echo, background=False)
    assert await echo_task(sublet).aio_run(Number(x=1)) == Number(x=1)
    with pytest.raises(RuntimeError, match="use the aio_… method"):
        echo_task(sublet).run(Number(x=1))
    await sublet.aio_close()
    assert broker.transports[0].closed


def test_a_client_connects_at_its_first_use() -> None:
    sublet, broker = client(echo)
    echo_task(sublet)
    assert not broker.transports


# --- what is sent ----------------------------------------------------------------------------------------------------


def test_a_request_is_persistent_and_goes_to_the_bucket_of_its_run() -> None:
    sublet, broker = client(echo)
    with closing(sublet):
        echo_task(sublet).run(Number(x=1))
    (published,) = broker.published
    (request,) = broker.requests
    assert (published.exchange, published.persistent) == ("sublet.requests", True)
    assert published.routing_key == run_key(request.run_id)
    assert (request.workflow, bytes(request.input)) == ("Double", b'{"x":1}')
    assert (request.reply_to, request.parent, request.notify_parent) == (broker.transports[0].inboxes[0], None, False)


async def test_runs_started_at_the_same_time_share_messages() -> None:
    sublet, broker = client(echo, background=False)
    task = echo_task(sublet)
    await asyncio.gather(*(task.aio_run(Number(x=n)) for n in range(1_000)))
    assert len(broker.requests) == 1_000
    assert len(broker.published) <= 2 * ids.BUCKETS


def test_a_bulk_sends_one_message_for_each_bucket() -> None:
    sublet, broker = client(echo)
    with closing(sublet):
        task = echo_task(sublet)
        task.run_many([task.create_bulk_run_item(Number(x=n)) for n in range(1_000)])
    assert len(broker.requests) == 1_000
    assert len(broker.published) == len({published.routing_key for published in broker.published}) <= ids.BUCKETS


def test_a_bulk_of_large_items_is_split_at_the_limit() -> None:
    sublet, broker = client(echo, new_id=lambda: "all-in-one-slot")
    with closing(sublet):
        task = sublet.stubs.task(name="big", input_validator=dict, output_validator=dict)
        third = {"x": "y" * (limits.BATCH_MAX_BYTES // 3)}
        task.run_many([task.create_bulk_run_item(third) for _ in range(5)])
    assert [len(msgspec.json.decode(p.body)) for p in broker.published] == [2, 2, 1]


def test_direct_arguments_override_options_in_the_request() -> None:
    sublet, broker = client(echo)
    with closing(sublet):
        task = echo_task(sublet, default_additional_metadata={"a": 1, "b": 1})
        task.run(
            Number(x=1),
            TriggerWorkflowOptions(additional_metadata={"b": 2, "c": 2}, priority=1),
            additional_metadata={"c": 3},
            priority=Priority.HIGH,
        )
    (request,) = broker.requests
    assert (request.metadata, request.priority) == ({"a": 1, "b": 2, "c": 3}, 3)


def test_a_stub_runs_a_workflow_of_another_program() -> None:
    sublet, broker = client(echo, config=ClientConfig(namespace="ns"))
    with closing(sublet):
        stub = sublet.stubs.task(name="Double", input_validator=Number, output_validator=Number)
        assert stub.run(Number(x=3)) == Number(x=3)
        assert sublet.stubs.workflow(name="Double").run() == {"ns_double": {}}
        with pytest.raises(ValueError, match="is a stub"):
            _ = stub.task
        with pytest.raises(ValueError, match="has no tasks"):
            stub.spec()
    assert {request.workflow for request in broker.requests} == {"ns_Double"}


# --- what comes back -------------------------------------------------------------------------------------------------


def ending(**result: Any) -> Any:
    """A broker at which every run ends like this."""

    def answer(record: Record) -> list[Record]:
        if isinstance(record, RunRequest | WatchRun) and record.reply_to:
            return [RunResult(run_id=record.run_id, **result)]
        return []

    return answer


def test_a_workflow_gives_the_output_of_each_task() -> None:
    outputs = {"a": msgspec.Raw(b'{"x":1}'), "b": msgspec.Raw(b"null"), "c": msgspec.Raw(b'{"skipped":true}')}
    sublet, _ = client(ending(status="COMPLETED", outputs=outputs))
    with closing(sublet):
        flow = sublet.workflow(name="flow")
        assert flow.run() == {"a": {"x": 1}, "b": None, "c": {"skipped": True}}
        assert flow.run(wait_for_result=False).result() == {"a": {"x": 1}, "b": None, "c": {"skipped": True}}


async def test_a_failed_run_raises_the_error_of_every_task() -> None:
    errors = (TaskError("ValueError", "no", "trace", "r.a"), TaskError("KeyError", "'k'"))
    sublet, _ = client(ending(status="FAILED", errors=errors))
    with closing(sublet):
        task = echo_task(sublet)
        ways: list[Callable[[], Number]] = [
            lambda: task.run(Number(x=1)),
            task.run(Number(x=1), wait_for_result=False).result,
        ]
        for run in ways:
            with pytest.raises(FailedTaskRunExceptionGroup) as caught:
                run()
            first, second = caught.value.exceptions
            assert (first.exc_type, first.exc, first.trace, first.task_run_external_id) == (
                "ValueError",
                "no",
                "trace",
                "r.a",
            )
            assert "ValueError: no\ntrace" in str(caught.value)
            assert "KeyError: 'k'" in str(caught.value)
            assert second.exc_type == "KeyError"
        with pytest.raises(FailedTaskRunExceptionGroup):
            await task.aio_run(Number(x=1))


async def test_a_cancelled_run_raises_in_sync_and_async_code() -> None:
    sublet, _ = client(ending(status="CANCELLED", cancelled_reason="by hand"))
    with closing(sublet):
        task = echo_task(sublet)
        with pytest.raises(RunCancelledError, match=r"Workflow run .* was cancelled: by hand"):
            task.run(Number(x=1))
        with pytest.raises(ValueError, match="was cancelled"):
            await task.aio_run(Number(x=1))


def test_the_error_for_an_unknown_workflow_names_the_cure() -> None:
    error = TaskError("UnknownWorkflow", "no worker has registered 'Double': start one")
    sublet, _ = client(ending(status="FAILED", errors=(error,)))
    with closing(sublet), pytest.raises(UnknownWorkflowError, match=r"run .* cannot begin: no worker .* start one"):
        echo_task(sublet).run(Number(x=1))


def test_the_result_of_a_run_that_does_not_exist_raises_at_once() -> None:
    sublet, _ = client(ending(status=None))
    with closing(sublet), pytest.raises(RunNotFoundError, match="There is no workflow run nowhere"):
        echo_task(sublet).get_run_ref("nowhere").result()


def test_a_result_that_does_not_fit_its_type_is_an_error_of_that_run_only() -> None:
    def answer(record: Record) -> list[Record]:
        assert isinstance(record, RunRequest)
        good = msgspec.json.decode(record.input)["x"] == 1
        return [completed(record.run_id, {"double": b'{"x":1}' if good else b'{"y":1}'})]

    sublet, _ = client(answer)
    with closing(sublet):
        task = echo_task(sublet)
        items = [task.create_bulk_run_item(Number(x=n)) for n in (1, 2)]
        good, bad = task.run_many(items, return_exceptions=True)
        assert good == Number(x=1)
        assert isinstance(bad, ValueError)


def test_return_exceptions_gives_each_run_its_own_outcome() -> None:
    def answer(record: Record) -> list[Record]:
        assert isinstance(record, RunRequest)
        if msgspec.json.decode(record.input)["x"] % 2:
            return [RunResult(record.run_id, "FAILED", errors=(TaskError("E", "odd"),))]
        return echo(record)

    sublet, _ = client(answer)
    with closing(sublet):
        task = echo_task(sublet)
        items = [task.create_bulk_run_item(Number(x=n)) for n in range(4)]
        outcomes = task.run_many(items, return_exceptions=True)
        assert [type(outcome).__name__ for outcome in outcomes] == ["Number", "FailedTaskRunExceptionGroup"] * 2
        with pytest.raises(FailedTaskRunExceptionGroup, match="odd"):
            task.run_many(items)


def test_run_without_waiting_returns_a_handle_of_the_result(sublet: Sublet) -> None:
    seen: dict[str, bytes] = {}

    def answer(record: Record) -> list[Record]:
        if isinstance(record, RunRequest):
            assert record.reply_to is None
            seen[record.run_id] = bytes(record.input)
            return []
        assert isinstance(record, WatchRun)
        return [completed(record.run_id, {"double": seen[record.run_id]})]

    sublet, _ = client(answer)
    with closing(sublet):
        task = echo_task(sublet)
        ref = task.run(Number(x=5), wait_for_result=False)
        assert str(ref) == ref.workflow_run_id == next(iter(seen))
        assert ref.result() == Number(x=5)
        assert sublet.runs.get_result(ref.workflow_run_id) == {"double": {"x": 5}}
        refs = task.run_many([task.create_bulk_run_item(Number(x=n)) for n in range(3)], wait_for_result=False)
        assert [ref.result().x for ref in refs] == [0, 1, 2]


async def test_a_cancelled_caller_ends_the_wait_for_its_result() -> None:
    sublet, broker = client(silent)
    with closing(sublet):
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(echo_task(sublet).aio_run(Number(x=1)), 0.2)
        # Later results for it find nobody, and harm nobody.
        broker.transports[0].deliver([completed(broker.requests[0].run_id, {})])


# --- inside of tasks -------------------------------------------------------------------------------------------------


@dataclass
class ParentContext:
    """As much of a context as children need."""

    is_durable: bool = False
    task_run_id: str = "parent.step"
    workflow_run_id: str = "parent"
    additional_metadata: dict[str, Any] = field(default_factory=lambda: {"tenant": 1, "depth": 0})
    outcome: Any = None
    spawned: list[tuple[Sequence[ChildSpawn], bool]] = field(default_factory=list)
    _index: int = -1

    def _next_child_index(self) -> int:
        self._index += 1
        return self._index

    async def _aio_spawn(self, spawns: Sequence[ChildSpawn], wait: bool) -> list[Any]:
        self.spawned.append((spawns, wait))
        if not wait:
            return [f"run-{n}" for n, _ in enumerate(spawns)]
        return [self.outcome or spawn.decode(spawn.input_json) for spawn in spawns]


@contextlib.contextmanager
def running(context: ParentContext) -> Iterator[None]:
    token = current_context.set(cast("Any", context))
    yield
    current_context.reset(token)


def test_children_have_a_parent_an_index_and_inherited_metadata() -> None:
    sublet, broker = client(echo)
    with closing(sublet), running(ParentContext()):
        assert sublet.current_context is not None
        task = echo_task(sublet, default_additional_metadata={"depth": 1})
        task.run(Number(x=1))
        task.run(Number(x=2), child_key="k", additional_metadata={"tenant": 2})
    first, second = broker.requests
    assert first.parent == second.parent == ParentLink("parent.step")
    assert first.run_id == ids.child_run_id("parent.step", index=0)
    assert second.run_id == ids.child_run_id("parent.step", child_key="k")
    assert (first.child_index, first.child_key, second.child_index, second.child_key) == (0, None, 1, "k")
    assert (first.metadata, second.metadata) == ({"tenant": 1, "depth": 1}, {"tenant": 2, "depth": 1})
    assert not first.notify_parent


async def test_a_retried_parent_gets_the_run_ids_of_its_earlier_children() -> None:
    sublet, broker = client(echo)
    with closing(sublet):
        for _ in range(2):
            with running(ParentContext()):
                await echo_task(sublet).aio_run(Number(x=1))
                await echo_task(sublet).aio_run(Number(x=1))
    run_ids = [request.run_id for request in broker.requests]
    assert run_ids[:2] == run_ids[2:]
    assert len(set(run_ids)) == 2


def test_two_children_with_one_key_are_one_run_with_two_results() -> None:
    sublet, broker = client(echo)
    with closing(sublet), running(ParentContext()):
        task = echo_task(sublet)
        items = [task.create_bulk_run_item(Number(x=1), child_key="same") for _ in range(2)]
        assert task.run_many(items) == [Number(x=1), Number(x=1)]
    assert len({request.run_id for request in broker.requests}) == 1


async def test_a_durable_task_starts_children_through_its_log() -> None:
    sublet, broker = client(silent)
    context = ParentContext(is_durable=True)
    with closing(sublet), running(context):
        task = echo_task(sublet)
        assert await task.aio_run(Number(x=1), child_key="k", priority=2) == Number(x=1)
        items = [task.create_bulk_run_item(Number(x=n)) for n in range(3)]
        assert await task.aio_run_many(items) == [Number(x=n) for n in range(3)]
        ref = await task.aio_run(Number(x=1), wait_for_result=False)
        assert ref.workflow_run_id == "run-0"
    assert not broker.published
    (only,), wait = context.spawned[0]
    assert (only.workflow, only.input_json, only.child_key, only.priority, wait) == ("Double", b'{"x":1}', "k", 2, True)
    assert only.metadata == {"tenant": 1, "depth": 0}
    assert [(len(spawns), wait) for spawns, wait in context.spawned[1:]] == [(3, True), (1, False)]


async def test_a_failed_child_of_a_durable_task_raises_its_error() -> None:
    sublet, _ = client(silent)
    error = TaskRunError("no", "ValueError")
    with closing(sublet), running(ParentContext(is_durable=True, outcome=error)):
        task = echo_task(sublet)
        with pytest.raises(TaskRunError, match="ValueError: no"):
            await task.aio_run(Number(x=1))
        items = [task.create_bulk_run_item(Number(x=1))]
        assert await task.aio_run_many(items, return_exceptions=True) == [error]


async def test_a_dag_as_a_durable_child_gives_a_dictionary() -> None:
    sublet, _ = client(silent)
    with closing(sublet), running(ParentContext(is_durable=True)):
        flow = sublet.workflow(name="flow", input_validator=dict)
        assert await flow.aio_run({"a": {"x": 1}}) == {"a": {"x": 1}}


# --- errors as values ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trace", ["", "Traceback:\n  line\nValueError: no"])
def test_a_task_error_is_read_from_its_text(trace: str) -> None:
    error = TaskRunError("no: really", "ValueError", trace, "r.t")
    again = TaskRunError.deserialize(error.serialize(include_metadata=True))
    assert (again.exc, again.exc_type, again.trace, again.task_run_external_id) == (
        error.args[0],
        "ValueError",
        trace,
        "r.t",
    )
    assert str(error) == error.serialize(include_metadata=False)


def test_another_text_becomes_the_message_of_a_task_error() -> None:
    error = TaskRunError.deserialize("something broke")
    assert (error.exc_type, error.exc) == ("SubletError", "something broke")


def test_a_task_error_is_made_from_an_exception() -> None:
    try:
        raise ValueError("no")
    except ValueError as raised:
        error = TaskRunError.from_exception(raised, "r.t")
    assert (error.exc, error.exc_type) == ("no", "ValueError")
    assert "raise ValueError" in error.trace
    assert TaskRunError.from_exception(error) is error


@pytest.mark.parametrize(
    "member",
    ["is_durable", "task_run_id", "workflow_run_id", "additional_metadata", "_next_child_index", "_aio_spawn"],
)
def test_the_real_context_has_every_member_of_the_fake_one(member: str) -> None:
    assert hasattr(DurableContext, member)
