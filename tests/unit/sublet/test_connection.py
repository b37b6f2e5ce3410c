"""`Connection`: lost messages, reconnects, long waits, and queries without an answer."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import msgspec
import pytest

from sublet import (
    BulkCancelReplayOpts,
    BulkPushEventWithMetadata,
    ClientConfig,
    RunFilter,
    RunNotFoundError,
    RunStatus,
    Sublet,
    TransportUnavailable,
)
from sublet_protocol.messages import CancelRun, Query, Record, ReplayRun, WatchRun
from support.fake_transport import FakeBroker, client, completed, echo, reply, silent
from support.virtual_time import EPOCH_S, VirtualClock, in_virtual_time


def here(answer: Callable[[Record], list[Record]]) -> tuple[Sublet, FakeBroker]:
    """A client on this (virtual) event loop."""
    return client(answer, background=False, now=VirtualClock().now)


def waiting(sublet: Sublet) -> asyncio.Task[dict[str, Any]]:
    return asyncio.create_task(sublet.stubs.workflow(name="flow").aio_run())


# --- results ---------------------------------------------------------------------------------------------------------


@in_virtual_time
async def test_a_lost_result_is_requested_again() -> None:
    def answer(record: Record) -> list[Record]:
        return [completed(record.run_id, {"t": b"{}"})] if isinstance(record, WatchRun) else []

    sublet, broker = here(answer)
    assert await waiting(sublet) == {"t": {}}
    assert len(broker.watches) == 1


@in_virtual_time
async def test_the_pause_between_requests_of_a_result_grows() -> None:
    sublet, broker = here(silent)
    run = waiting(sublet)
    await asyncio.sleep(3600)
    assert 55 <= len(broker.watches) <= 65
    broker.transports[0].deliver([completed(broker.requests[0].run_id, {})])
    assert await run == {}
    asked = len(broker.watches)
    await asyncio.sleep(3600)
    assert len(broker.watches) == asked


@in_virtual_time
async def test_a_reconnect_requests_every_pending_result() -> None:
    sublet, broker = here(silent)
    runs = [waiting(sublet) for _ in range(5)]
    await asyncio.sleep(1)
    broker.transports[0].reconnect()
    await asyncio.sleep(0.01)
    assert {watch.run_id for watch in broker.watches} == {request.run_id for request in broker.requests}
    for request in broker.requests:
        broker.transports[0].deliver([completed(request.run_id, {})])
    assert await asyncio.gather(*runs) == [{}] * 5


@in_virtual_time
async def test_two_callers_that_wait_for_one_run_both_get_its_result() -> None:
    sublet, broker = here(silent)
    ref = sublet.runs.get_run_ref("r1")
    first, second = (asyncio.create_task(ref.aio_result()) for _ in range(2))
    await asyncio.sleep(1)
    first.cancel()
    await asyncio.sleep(1)
    broker.transports[0].deliver([completed("r1", {"t": b"{}"})])
    assert await second == {"t": {}}


@in_virtual_time
async def test_a_second_result_and_an_unreadable_message_are_ignored() -> None:
    sublet, broker = here(silent)
    run = waiting(sublet)
    await asyncio.sleep(1)
    result = completed(broker.requests[0].run_id, {})
    broker.transports[0].deliver([result, result])
    for on_message in broker.transports[0]._inboxes.values():
        on_message(b"not json")
    assert await run == {}


@in_virtual_time
async def test_close_raises_in_every_waiting_caller() -> None:
    sublet, broker = here(silent)
    run = waiting(sublet)
    await asyncio.sleep(1)
    await sublet.aio_close()
    with pytest.raises(TransportUnavailable, match="the client was closed"):
        await run
    assert broker.transports[0].closed


def test_a_closed_client_connects_again_when_it_is_used() -> None:
    sublet, broker = client(echo)
    for _ in range(2):
        assert sublet.stubs.workflow(name="flow").run() == {"flow": {}}
        sublet.close()
    assert len(broker.transports) == 2


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_client_that_was_used_before_a_fork_works_in_parent_and_child() -> None:
    sublet, broker = client(echo)
    flow = sublet.stubs.workflow(name="flow")
    flow.run()
    child = os.fork()
    if not child:
        os._exit(0 if flow.run() == {"flow": {}} and len(broker.transports) == 2 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert flow.run() == {"flow": {}}
    assert len(broker.transports) == 1
    sublet.close()


@in_virtual_time
async def test_an_unreachable_broker_raises_after_the_timeout_and_connecting_continues() -> None:
    sublet, broker = here(echo)

    def late(config: ClientConfig) -> Any:
        transport = broker(config)

        async def connect() -> None:
            await asyncio.sleep(45)

        transport.connect = connect  # type: ignore[method-assign]
        return transport

    sublet._connection._transport_factory = late
    with pytest.raises(TransportUnavailable, match=r"no connection to RabbitMQ: is it running.* within 30 s"):
        await waiting(sublet)
    assert await waiting(sublet) == {"flow": {}}
    assert len(broker.transports) == 1


# --- events ----------------------------------------------------------------------------------------------------------


def test_an_event_is_json_with_an_id_and_headers() -> None:
    sublet, broker = client(silent, config=ClientConfig(namespace="ns"))
    event = sublet.event.push("order.paid", {"id": 1}, additional_metadata={"a": [1]}, priority=2, scope="s")
    (published,) = broker.published
    assert (published.exchange, published.routing_key, published.body) == (
        "sublet.events",
        "ns_order.paid",
        b'{"id":1}',
    )
    assert dict(published.headers) == {"a": [1], "scope": "s", "priority": 2}
    assert (event.event_id, event.key, event.payload) == (published.message_id, "ns_order.paid", '{"id":1}')
    assert (event.additional_metadata, event.scope) == ('{"a":[1]}', "s")
    assert not broker.transports[0].inboxes  # a client that only publishes needs no right to read
    sublet.close()


async def test_bulk_push_gives_each_event_its_own_id() -> None:
    sublet, broker = client(silent)
    events = await sublet.event.aio_bulk_push(
        [BulkPushEventWithMetadata(key=f"k{n}", payload={"n": n}) for n in range(50)]
    )
    assert [event.key for event in events] == [f"k{n}" for n in range(50)]
    assert len({published.message_id for published in broker.published}) == 50
    sublet.close()


@pytest.mark.parametrize(
    ("key", "payload", "metadata", "message"),
    [
        ("", {}, {}, "the key of an event must not be empty"),
        ("k" * 129, {}, {}, "has 129 characters"),
        ("k", {"x": object()}, {}, "payload of event 'k' cannot be written as JSON"),
        ("k", {"x": "y" * 1_048_576}, {}, r"payload of event 'k' has 1,048,584 bytes of JSON; the limit is 1,048,576"),
        ("k", {}, {"x": "y" * 65_536}, r"metadata of event 'k' has .* the limit is 65,536"),
        ("k", {}, {"scope": "s"}, "must not have an entry 'scope'"),
    ],
)
def test_an_event_that_is_not_valid_is_refused(
    key: str, payload: dict[str, Any], metadata: dict[str, Any], message: str
) -> None:
    sublet, broker = client(silent)
    with pytest.raises(ValueError, match=message):
        sublet.event.push(key, payload, metadata)
    assert not broker.published


# --- questions -------------------------------------------------------------------------------------------------------

TASK = {
    "task_run_id": "r1.t", "name": "t", "status": "FAILED", "is_evicted": False, "retry_count": 2, "invocation": 3,
    "output": None, "error": {"type": "ValueError", "message": "no", "trace": "…"}, "queued_at": EPOCH_S,
    "started_at": EPOCH_S + 1, "finished_at": EPOCH_S + 3.5, "worker": "w",
}  # fmt: skip
RUN = {
    "run_id": "r1", "workflow": "flow", "version": "v", "status": "FAILED", "input": {"x": 1}, "metadata": {"m": 1},
    "priority": 1, "created_at": EPOCH_S, "started_at": EPOCH_S + 1, "finished_at": EPOCH_S + 4, "trigger": None,
    "error_message": "ValueError: no", "parent_task_run_id": None, "tasks": [TASK],
}  # fmt: skip


def answering(value: Any) -> Callable[[Record], list[Record]]:
    def answer(record: Record) -> list[Record]:
        assert isinstance(record, Query | CancelRun | ReplayRun)
        return [reply(record.correlation_id, value)]

    return answer


@in_virtual_time
async def test_get_returns_the_run_and_its_tasks() -> None:
    sublet, broker = here(answering(RUN))
    details = await sublet.runs.aio_get("r1")
    assert (details.run.metadata.id, details.run.status, details.run.input) == ("r1", RunStatus.FAILED, {"x": 1})
    assert (details.run.duration, details.run.error_message) == (3000, "ValueError: no")
    (task,) = details.tasks
    assert (task.display_name, task.attempt, task.error_message, task.duration) == ("t", 3, "ValueError: no", 2500)
    short = await sublet.runs.aio_get_details("r1")
    assert (short.done, short.task_runs["t"].error, short.task_runs["t"].external_id) == (
        True,
        "ValueError: no",
        "r1.t",
    )
    assert await sublet.runs.aio_get_status("r1") is RunStatus.FAILED
    assert all(published.routing_key == "query" for published in broker.published)


@in_virtual_time
async def test_get_repeats_the_query_for_a_run_that_is_not_stored_yet() -> None:
    answers = iter([None, None, RUN])

    def answer(record: Record) -> list[Record]:
        assert isinstance(record, Query)
        return [reply(record.correlation_id, next(answers, None))]

    sublet, _ = here(answer)
    assert await sublet.runs.aio_get_status("r1") is RunStatus.FAILED
    with pytest.raises(RunNotFoundError, match="There is no run r2"):
        await sublet.runs.aio_get("r2")


@in_virtual_time
async def test_list_sends_every_filter_to_the_scheduler() -> None:
    sublet, broker = here(answering({"rows": [{k: v for k, v in RUN.items() if k != "tasks"}]}))
    page = await sublet.runs.aio_list(
        limit=5, statuses=[RunStatus.FAILED], workflow_ids=["flow"], additional_metadata={"m": 1}
    )
    assert [row.workflow_name for row in page.rows] == ["flow"]
    (query,) = broker.records
    assert isinstance(query, Query)
    assert msgspec.json.decode(query.arguments) == {
        "since": EPOCH_S - 86_400,
        "statuses": ["FAILED"],
        "workflows": ["flow"],
        "metadata": {"m": 1},
        "limit": 5,
        "offset": 0,
    }


@in_virtual_time
async def test_a_lost_query_is_published_again() -> None:
    asked = 0

    def answer(record: Record) -> list[Record]:
        nonlocal asked
        asked += 1
        assert isinstance(record, Query)
        return [reply(record.correlation_id, RUN)] if asked == 3 else []

    sublet, _ = here(answer)
    assert await sublet.runs.aio_get_status("r1") is RunStatus.FAILED


@in_virtual_time
async def test_a_query_without_an_answer_raises_after_its_timeout() -> None:
    sublet, _ = here(silent)
    with pytest.raises(
        TransportUnavailable, match=r"looking up run r1: no answer within 15 s. Is a scheduler running\?"
    ):
        await sublet.runs.aio_get("r1")


@in_virtual_time
async def test_cancel_and_replay_send_requests_to_the_shard_of_the_run() -> None:
    sublet, broker = here(answering(None))
    await sublet.runs.aio_cancel("r1")
    await sublet.runs.aio_cancel("r1.step")
    await sublet.runs.aio_replay("r1")
    cancel_run, cancel_task, replay = broker.records
    assert isinstance(cancel_run, CancelRun)
    assert isinstance(cancel_task, CancelRun)
    assert isinstance(replay, ReplayRun)
    assert (cancel_run.run_id, cancel_run.task_run_id) == ("r1", None)
    assert (cancel_task.run_id, cancel_task.task_run_id) == ("r1", "r1.step")
    assert replay.run_id == "r1"
    assert len({published.routing_key for published in broker.published}) == 1


@in_virtual_time
async def test_replay_raises_the_reason_of_the_scheduler() -> None:
    def answer(record: Record) -> list[Record]:
        assert isinstance(record, ReplayRun)
        return [reply(record.correlation_id, error="run r1 is still RUNNING")]

    sublet, _ = here(answer)
    with pytest.raises(ValueError, match="replaying run r1: run r1 is still RUNNING"):
        await sublet.runs.aio_replay("r1")


@in_virtual_time
async def test_a_replay_without_an_answer_is_not_repeated() -> None:
    sublet, broker = here(silent)
    with pytest.raises(TransportUnavailable, match="replaying run r1: no answer"):
        await sublet.runs.aio_replay("r1")
    assert len(broker.records) == 1


@in_virtual_time
async def test_bulk_cancel_tries_all_runs_and_raises_the_first_error() -> None:
    def answer(record: Record) -> list[Record]:
        assert isinstance(record, CancelRun)
        return [reply(record.correlation_id, error="no such run" if record.run_id == "r1" else None)]

    sublet, broker = here(answer)
    with pytest.raises(ValueError, match="cancelling r1: no such run"):
        await sublet.runs.aio_bulk_cancel(BulkCancelReplayOpts(ids=["r1", "r2", "r3"]))
    assert len(broker.records) == 3


@in_virtual_time
async def test_bulk_cancel_by_filter_reads_every_page() -> None:
    def answer(record: Record) -> list[Record]:
        if isinstance(record, CancelRun):
            return [reply(record.correlation_id)]
        assert isinstance(record, Query)
        offset = msgspec.json.decode(record.arguments)["offset"]
        rows = [RUN | {"run_id": f"r{n}"} for n in range(offset, min(offset + 500, 1_100))]
        return [reply(record.correlation_id, {"rows": rows})]

    sublet, broker = here(answer)
    filters = RunFilter(since=datetime(2026, 1, 1, tzinfo=UTC))
    await sublet.runs.aio_bulk_cancel(BulkCancelReplayOpts(filters=filters))
    cancelled = {record.run_id for record in broker.records if isinstance(record, CancelRun)}
    assert cancelled == {f"r{n}" for n in range(1_100)}


def test_bulk_cancel_takes_either_ids_or_a_filter() -> None:
    with pytest.raises(ValueError, match="exactly one of ids and filters"):
        BulkCancelReplayOpts()


async def test_queries_work_in_sync_and_async_code() -> None:
    sublet, _ = client(answering(RUN))
    assert sublet.runs.get_status("r1") is await sublet.runs.aio_get_status("r1")
    sublet.close()
