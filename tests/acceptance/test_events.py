"""Events: from any AMQP client, before or after the wait, each once."""

from __future__ import annotations

import asyncio
import json
import uuid
from typing import Any

import aio_pika
import pytest

from acceptance.environment import Environment, eventually, short_delay
from sublet import BulkPushEventWithMetadata

pytestmark = pytest.mark.real


async def push_counts(environment: Environment, *numbers: int) -> None:
    for n in numbers:
        await environment.client.event.aio_push("count", {"n": n})


async def test_events_before_the_wait_are_seen_in_order_and_each_once(environment: Environment) -> None:
    await environment.worker("collect", durable_slots=1)
    run = await environment.workflows.collect.aio_run(environment.workflows.Number(n=3), wait_for_result=False)
    await environment.until_written("collecting")
    await push_counts(environment, 1, 2, 3)
    environment.journal.open_gate("collect")
    assert await run.aio_result() == {"seen": [1, 2, 3]}


async def test_events_after_the_wait_are_seen_in_order_and_each_once(environment: Environment) -> None:
    await environment.worker("collect", durable_slots=1)
    environment.journal.open_gate("collect")
    run = await environment.workflows.collect.aio_run(environment.workflows.Number(n=4), wait_for_result=False)
    await environment.until_written("collecting")
    await environment.until_evicted(run.workflow_run_id)
    await push_counts(environment, 1, 2, 3, 4, 5)
    assert await run.aio_result() == {"seen": [1, 2, 3, 4]}


async def test_one_event_wakes_every_task_that_waits_for_it(environment: Environment) -> None:
    await environment.worker("collect", durable_slots=5)
    collect = environment.workflows.collect
    environment.journal.open_gate("collect")
    items = [collect.create_bulk_run_item(environment.workflows.Number(n=1)) for _ in range(50)]
    runs = await collect.aio_run_many(items, wait_for_result=False)
    await environment.until_written("collecting", 50)
    await push_counts(environment, 7)
    assert await asyncio.gather(*(run.aio_result() for run in runs)) == [{"seen": [7]}] * 50


async def test_an_event_published_with_aio_pika_wakes_the_task_whose_expression_matches(
    environment: Environment,
) -> None:
    await environment.worker("await_payment", durable_slots=1)
    await_payment, number = environment.workflows.await_payment, environment.workflows.Number
    runs = [await await_payment.aio_run(number(n=n), wait_for_result=False) for n in (1, 2)]
    await environment.until_written("awaiting", n=2)
    for payload in ({}, {"order": "two"}, {"order": [2]}, {"order": 3, "amount": 1}):
        await environment.publish_event("paid", json.dumps(payload).encode())
    await environment.publish_event("paid", b'{"order": 2, "amount": 9.5}', message_id=str(uuid.uuid4()))
    paid = await runs[1].aio_result()
    assert (paid.order, paid.amount) == (2, 9.5)
    await environment.publish_event("paid", b'{"order": 1, "amount": 1}')
    assert (await runs[0].aio_result()).order == 1


async def test_an_event_with_a_scope_wakes_only_waits_with_this_scope(environment: Environment) -> None:
    await environment.worker("hear_scope", durable_slots=1)
    runs = {
        name: await environment.workflows.hear_scope.aio_run(
            environment.workflows.Named(name=name), wait_for_result=False
        )
        for name in ("red", "blue")
    }
    for run in runs.values():
        await environment.until_evicted(run.workflow_run_id)
    await environment.client.event.aio_push("said", {"to": "nobody"})
    await environment.client.event.aio_push("said", {"to": "blue"}, scope="blue")
    await environment.publish_event("said", b'{"to": "red"}', headers={"scope": "red"})
    for name, run in runs.items():
        assert await run.aio_result() == {"CREATE": {"said": [{"to": name}]}}


async def test_a_wait_can_look_back_over_the_time_before_its_run(environment: Environment) -> None:
    await environment.worker("look_back", durable_slots=1)
    await environment.client.event.aio_push("said", {"when": "before"}, scope="past")
    await environment.client.event.aio_push("said", {"when": "elsewhere"}, scope="other")
    assert await environment.workflows.look_back.aio_run(environment.workflows.Named(name="past")) == {"when": "before"}


async def test_an_event_starts_the_workflows_that_name_its_key(environment: Environment) -> None:
    await environment.worker("on_number", slots=1)
    await environment.client.event.aio_push("number.one", {"n": 1}, additional_metadata={"source": "sdk"})
    await environment.publish_event("number.two", b'{"n": 2}', headers={"source": "till"}, message_id="receipt 2")
    await environment.publish_event("number.two", b'{"n": 2}', headers={"source": "till"}, message_id="receipt 2")
    await environment.publish_event("letter.one", b'{"n": 3}')
    await environment.until_written("triggered", n=1)
    await environment.until_written("triggered", n=2)
    await short_delay()
    assert sorted(environment.journal.values("triggered", "n")) == [1, 2], (
        "one run for each event, however often it is sent"
    )
    (second,) = environment.journal.entries("triggered", n=2)
    assert second["key"] == f"{environment.namespace}number.two"
    assert second["metadata"]["source"] == "till"


async def test_an_event_starts_one_run_for_each_filter_that_lets_it_through(environment: Environment) -> None:
    await environment.worker("on_measured", slots=1)
    events = [
        BulkPushEventWithMetadata(key="measured", payload={"n": n}, scope=scope)
        for n, scope in ((5, "plant"), (15, "plant"), (25, "plant"), (99, "elsewhere"), (99, None))
    ]
    await environment.client.event.aio_bulk_push(events)
    await environment.until_written("measured", 3)
    await short_delay()
    seen = sorted((entry["n"], entry["above"]) for entry in environment.journal.entries("measured"))
    assert seen == [(15, 10), (25, 10), (25, 20)]


async def test_one_event_both_answers_a_wait_and_starts_a_run(environment: Environment) -> None:
    await environment.worker("on_count", "collect")
    environment.journal.open_gate("collect")
    run = await environment.workflows.collect.aio_run(environment.workflows.Number(n=1), wait_for_result=False)
    await environment.until_written("collecting")
    await push_counts(environment, 3)
    assert await run.aio_result() == {"seen": [3]}
    await environment.until_written("counted", n=3)


async def test_an_event_that_does_not_fit_the_input_makes_a_run_that_says_so(environment: Environment) -> None:
    await environment.worker("on_number", slots=1)
    event = await environment.client.event.aio_push("number.odd", {"n": "seven"})

    async def failed() -> bool:
        rows = (await environment.client.runs.aio_list(triggering_event_external_id=event.event_id)).rows
        return bool(rows) and rows[0].status == "FAILED" and "ValidationError" in (rows[0].error_message or "")

    await eventually(failed, "the run has failed with a validation error")


async def test_any_amqp_client_can_watch_runs_and_tasks(environment: Environment) -> None:
    await environment.worker("nap", durable_slots=1)
    seen: dict[str, dict[str, Any]] = {}
    name = f"{environment.namespace}nap"
    async with await environment.amqp() as connection:
        channel = await connection.channel()
        queue = await channel.declare_queue(exclusive=True)
        for pattern in (f"run.*.{name}", f"task.*.{name}.*"):
            await queue.bind("sublet.notices", pattern)

        async def note(message: aio_pika.abc.AbstractIncomingMessage) -> None:
            seen[str(message.routing_key)] = json.loads(message.body)

        await queue.consume(note, no_ack=True)
        run = await environment.workflows.nap.aio_run(environment.workflows.Nap(seconds=0.1), wait_for_result=False)
        await eventually(lambda: f"run.completed.{name}" in seen, "the end of the run is announced")
    assert seen[f"run.completed.{name}"]["run_id"] == run.workflow_run_id
    assert seen[f"task.evicted.{name}.nap"]["task_run_id"] == f"{run.workflow_run_id}.nap"
