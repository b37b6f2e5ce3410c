"""Events: from any AMQP client, before or after the wait, each once."""

from __future__ import annotations

import asyncio
import json
import uuid
from typing import Any

import aio_pika
import pytest

from acceptance.environment import Lab, a_while, eventually
from sublet import BulkPushEventWithMetadata

pytestmark = pytest.mark.real


async def push_counts(lab: Lab, *numbers: int) -> None:
    for n in numbers:
        await lab.client.event.aio_push("count", {"n": n})


async def test_events_before_the_wait_are_seen_in_order_and_each_once(lab: Lab) -> None:
    await lab.worker("collect", durable_slots=1)
    run = await lab.workflows.collect.aio_run(lab.workflows.Number(n=3), wait_for_result=False)
    await lab.until_written("collecting")
    await push_counts(lab, 1, 2, 3)
    lab.ledger.open_gate("collect")
    assert await run.aio_result() == {"seen": [1, 2, 3]}


async def test_events_after_the_wait_are_seen_in_order_and_each_once(lab: Lab) -> None:
    await lab.worker("collect", durable_slots=1)
    lab.ledger.open_gate("collect")
    run = await lab.workflows.collect.aio_run(lab.workflows.Number(n=4), wait_for_result=False)
    await lab.until_written("collecting")
    await lab.until_evicted(run.workflow_run_id)
    await push_counts(lab, 1, 2, 3, 4, 5)
    assert await run.aio_result() == {"seen": [1, 2, 3, 4]}


async def test_one_event_wakes_everybody_who_waits_for_it(lab: Lab) -> None:
    await lab.worker("collect", durable_slots=5)
    collect = lab.workflows.collect
    lab.ledger.open_gate("collect")
    items = [collect.create_bulk_run_item(lab.workflows.Number(n=1)) for _ in range(50)]
    runs = await collect.aio_run_many(items, wait_for_result=False)
    await lab.until_written("collecting", 50)
    await push_counts(lab, 7)
    assert await asyncio.gather(*(run.aio_result() for run in runs)) == [{"seen": [7]}] * 50


async def test_an_event_published_with_aio_pika_answers_the_one_whose_expression_fits(lab: Lab) -> None:
    await lab.worker("await_payment", durable_slots=1)
    await_payment, number = lab.workflows.await_payment, lab.workflows.Number
    runs = [await await_payment.aio_run(number(n=n), wait_for_result=False) for n in (1, 2)]
    await lab.until_written("awaiting", n=2)
    for payload in ({}, {"order": "two"}, {"order": [2]}, {"order": 3, "amount": 1}):
        await lab.publish_event("paid", json.dumps(payload).encode())
    await lab.publish_event("paid", b'{"order": 2, "amount": 9.5}', message_id=str(uuid.uuid4()))
    paid = await runs[1].aio_result()
    assert (paid.order, paid.amount) == (2, 9.5)
    await lab.publish_event("paid", b'{"order": 1, "amount": 1}')
    assert (await runs[0].aio_result()).order == 1


async def test_a_scope_is_heard_by_those_who_want_exactly_that_one(lab: Lab) -> None:
    await lab.worker("hear_scope", durable_slots=1)
    runs = {
        name: await lab.workflows.hear_scope.aio_run(lab.workflows.Named(name=name), wait_for_result=False)
        for name in ("red", "blue")
    }
    for run in runs.values():
        await lab.until_evicted(run.workflow_run_id)
    await lab.client.event.aio_push("said", {"to": "nobody"})
    await lab.client.event.aio_push("said", {"to": "blue"}, scope="blue")
    await lab.publish_event("said", b'{"to": "red"}', headers={"scope": "red"})
    for name, run in runs.items():
        assert await run.aio_result() == {"CREATE": {"said": [{"to": name}]}}


async def test_a_wait_can_look_back_over_the_time_before_its_run(lab: Lab) -> None:
    await lab.worker("look_back", durable_slots=1)
    await lab.client.event.aio_push("said", {"when": "before"}, scope="past")
    await lab.client.event.aio_push("said", {"when": "elsewhere"}, scope="other")
    assert await lab.workflows.look_back.aio_run(lab.workflows.Named(name="past")) == {"when": "before"}


async def test_an_event_starts_the_workflows_that_name_its_key(lab: Lab) -> None:
    await lab.worker("on_number", slots=1)
    await lab.client.event.aio_push("number.one", {"n": 1}, additional_metadata={"source": "sdk"})
    await lab.publish_event("number.two", b'{"n": 2}', headers={"source": "till"}, message_id="receipt 2")
    await lab.publish_event("number.two", b'{"n": 2}', headers={"source": "till"}, message_id="receipt 2")
    await lab.publish_event("letter.one", b'{"n": 3}')
    await lab.until_written("triggered", n=1)
    await lab.until_written("triggered", n=2)
    await a_while()
    assert sorted(lab.ledger.values("triggered", "n")) == [1, 2], "one run for each event, however often it is sent"
    (second,) = lab.ledger.entries("triggered", n=2)
    assert second["key"] == f"{lab.namespace}number.two"
    assert second["metadata"]["source"] == "till"


async def test_an_event_starts_one_run_for_each_filter_that_lets_it_through(lab: Lab) -> None:
    await lab.worker("on_measured", slots=1)
    events = [
        BulkPushEventWithMetadata(key="measured", payload={"n": n}, scope=scope)
        for n, scope in ((5, "plant"), (15, "plant"), (25, "plant"), (99, "elsewhere"), (99, None))
    ]
    await lab.client.event.aio_bulk_push(events)
    await lab.until_written("measured", 3)
    await a_while()
    seen = sorted((entry["n"], entry["above"]) for entry in lab.ledger.entries("measured"))
    assert seen == [(15, 10), (25, 10), (25, 20)]


async def test_one_event_both_answers_a_wait_and_starts_a_run(lab: Lab) -> None:
    await lab.worker("on_count", "collect")
    lab.ledger.open_gate("collect")
    run = await lab.workflows.collect.aio_run(lab.workflows.Number(n=1), wait_for_result=False)
    await lab.until_written("collecting")
    await push_counts(lab, 3)
    assert await run.aio_result() == {"seen": [3]}
    await lab.until_written("counted", n=3)


async def test_an_event_that_does_not_fit_the_input_makes_a_run_that_says_so(lab: Lab) -> None:
    await lab.worker("on_number", slots=1)
    event = await lab.client.event.aio_push("number.odd", {"n": "seven"})

    async def failed() -> bool:
        rows = (await lab.client.runs.aio_list(triggering_event_external_id=event.event_id)).rows
        return bool(rows) and rows[0].status == "FAILED" and "ValidationError" in (rows[0].error_message or "")

    await eventually(failed, "the run has failed with a validation error")


async def test_any_amqp_client_can_watch_runs_and_tasks(lab: Lab) -> None:
    await lab.worker("nap", durable_slots=1)
    seen: dict[str, dict[str, Any]] = {}
    name = f"{lab.namespace}nap"
    async with await lab.amqp() as connection:
        channel = await connection.channel()
        queue = await channel.declare_queue(exclusive=True)
        for pattern in (f"run.*.{name}", f"task.*.{name}.*"):
            await queue.bind("sublet.notices", pattern)

        async def note(message: aio_pika.abc.AbstractIncomingMessage) -> None:
            seen[str(message.routing_key)] = json.loads(message.body)

        await queue.consume(note, no_ack=True)
        run = await lab.workflows.nap.aio_run(lab.workflows.Nap(seconds=0.1), wait_for_result=False)
        await eventually(lambda: f"run.completed.{name}" in seen, "the end of the run is announced")
    assert seen[f"run.completed.{name}"]["run_id"] == run.workflow_run_id
    assert seen[f"task.evicted.{name}.nap"]["task_run_id"] == f"{run.workflow_run_id}.nap"
