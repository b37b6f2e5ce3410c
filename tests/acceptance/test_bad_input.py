"""What is wrong is said clearly, to whom it concerns, and nothing else suffers."""

from __future__ import annotations

import asyncio
import json
import uuid

import aio_pika
import msgspec
import pydantic
import pytest

from acceptance.environment import Environment, eventually
from acceptance.stack import SERVICES, Stack
from sublet import (
    DefaultFilter,
    FailedTaskRunExceptionGroup,
    ParentCondition,
    SleepCondition,
    UnknownWorkflowError,
    UserEventCondition,
)
from sublet_protocol import limits
from sublet_protocol.messages import Finished, RunRequest, encode
from sublet_protocol.topology import run_key

pytestmark = pytest.mark.real


# --- from callers ---------------------------------------------------------------------------------------------


async def test_a_run_of_an_unknown_workflow_is_refused_with_advice(environment: Environment) -> None:
    with pytest.raises(UnknownWorkflowError, match="start a worker that has it"):
        await environment.client.stubs.task(name="nobody-knows-me").aio_run()


async def test_input_that_does_not_fit_is_refused_at_the_caller(environment: Environment) -> None:
    w = environment.workflows
    with pytest.raises(pydantic.ValidationError):
        await w.double.aio_run({"n": "many"})
    with pytest.raises(ValueError, match="the limit is 1,048,576"):
        await w.mirror_dict.aio_run({"much": "x" * limits.PAYLOAD_MAX_BYTES})
    with pytest.raises(ValueError, match="the limit is 1,048,576"):
        await environment.client.event.aio_push("big", {"much": "x" * limits.PAYLOAD_MAX_BYTES})


async def test_declarations_that_cannot_work_are_refused_when_they_are_made(environment: Environment) -> None:
    client = environment.client
    twice = client.workflow(name="twice")

    @twice.task(name="same")
    async def one(input: object, ctx: object) -> None: ...

    with pytest.raises(ValueError, match="already has a task 'same'"):
        twice.task(name="same")(one.fn)
    with pytest.raises(ValueError, match="'sleep:1s'"):
        twice.task(name="keys", wait_for=[SleepCondition("1s"), SleepCondition("1s")])(one.fn)

    cyclic = client.workflow(name="cyclic")
    first = cyclic.task(name="first")(one.fn)
    second = cyclic.task(name="second", parents=[first])(one.fn)
    first.parents.append(second)
    with pytest.raises(ValueError, match="form a cycle: first, second"):
        client.worker("never", workflows=[cyclic])


async def test_a_bad_expression_is_refused_when_it_is_made(environment: Environment) -> None:
    for bad in ("input.", "input.n ==", "unknown_function(input.n)"):
        with pytest.raises(ValueError, match="expression"):
            UserEventCondition("key", bad)
    with pytest.raises(ValueError, match="expression"):
        ParentCondition(environment.workflows.reserve, "output.n >")
    with pytest.raises(ValueError, match="expression"):
        DefaultFilter(expression="input.n >", scope="s")


async def test_a_bad_expression_in_a_durable_task_fails_that_task_alone(environment: Environment) -> None:
    await environment.worker("await_badly", "await_payment", durable_slots=1)
    good = await environment.workflows.await_payment.aio_run(environment.workflows.Number(n=1), wait_for_result=False)
    with pytest.raises(FailedTaskRunExceptionGroup, match="expression"):
        await environment.workflows.await_badly.aio_run()
    await environment.client.event.aio_push("paid", {"order": 1, "amount": 2})
    assert (await good.aio_result()).amount == 2


# --- from the broker ------------------------------------------------------------------------------------------

QUEUES = {
    "a scheduler": ("sublet.requests", "bucket.07"),
    "queries": ("sublet.requests", "query"),
    "schedulers, from workers": ("sublet.workers", ""),
    "the timer": ("", "sublet.timers"),
    "event-ingest": ("", "sublet.ingest"),
}


@pytest.mark.parametrize("whom", QUEUES)
async def test_a_malformed_message_is_dead_lettered_with_a_reason_and_affects_no_other(
    environment: Environment, whom: str
) -> None:
    await environment.worker("journey", "double", slots=1, durable_slots=1)
    environment.journal.open_gate("journey")
    run = await environment.workflows.journey.aio_run(wait_for_result=False)
    exchange, key = QUEUES[whom]
    for form in (b"%s is no JSON", b'[{"t": "Nonsense", "x": "%s"}]', b'{"t": "tick", "at": "%s"}'):
        marker = uuid.uuid4().hex.encode()
        await environment.publish(exchange, key, form % marker)
        dead = await environment.dead_letter(marker)
        assert dead.headers["x-sublet-reason"]
        assert dead.headers["x-sublet-routing-key"] == key
    await environment.until_written("journey invoked", 2)
    await environment.client.event.aio_push("answer", {})
    await run.aio_result()


@pytest.mark.parametrize(
    ("form", "reason"),
    [
        (b"%s is no JSON", "not JSON"),
        (b'["%s"]', "must be a JSON object"),
        (b'{"\xff": "%s"}', "not JSON"),
        (b'{"much": "%s' + b"x" * limits.PAYLOAD_MAX_BYTES + b'"}', "at most 1,048,576"),
        (b'{"deep": "%s", "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", ""),
    ],
    ids=["no JSON", "no object", "no UTF-8", "too large", "too deep"],
)
async def test_an_invalid_event_is_dead_lettered_and_the_events_around_it_are_handled(
    environment: Environment, form: bytes, reason: str
) -> None:
    await environment.worker("on_number", slots=1)
    marker = uuid.uuid4().hex.encode()
    await environment.publish_event("number.before", b'{"n": 1}')
    await environment.publish_event("number.bad", form % marker)
    await environment.publish_event("number.after", b'{"n": 2}')
    dead = await environment.dead_letter(marker)
    assert reason in str(dead.headers["x-sublet-reason"])
    await environment.until_written("triggered", n=1)
    await environment.until_written("triggered", n=2)
    assert environment.journal.count("triggered") == 2


async def test_a_request_that_is_too_large_is_dead_lettered_and_its_shard_continues(environment: Environment) -> None:
    await environment.worker("double", slots=1)
    run_id, marker = str(uuid.uuid4()), uuid.uuid4().hex
    huge = json.dumps({"n": 1, "much": marker + "x" * limits.PAYLOAD_MAX_BYTES}).encode()
    name = f"{environment.namespace}double"
    await environment.publish("sublet.requests", run_key(run_id), _request(run_id, name, huge))
    dead = await environment.dead_letter(marker.encode())
    assert "at most 1,048,576 are allowed" in str(dead.headers["x-sublet-reason"])
    sibling = next(each for each in iter(lambda: str(uuid.uuid4()), "") if run_key(each) == run_key(run_id))
    await environment.publish("sublet.requests", run_key(run_id), _request(sibling, name, b'{"n": 3}'))
    assert await environment.client.runs.aio_get_result(sibling) == {"double": {"n": 6}}


def _request(run_id: str, workflow: str, body: bytes) -> bytes:
    marker = b'"here comes the input"'
    return encode([RunRequest(run_id, workflow, input=msgspec.Raw(marker))]).replace(marker, body)


async def test_reports_under_leases_that_never_were_change_nothing(environment: Environment) -> None:
    await environment.worker("work", slots=1)
    run = await environment.workflows.work.aio_run(environment.workflows.Named(name="a"), wait_for_result=False)
    await environment.until_written("work began")
    run_id = run.workflow_run_id
    for lease in (f"{run_id}.work@99", f"{run_id}.nothing@1", f"{uuid.uuid4()}.work@1"):
        await environment.report(Finished(lease, None))
    environment.journal.open_gate("a")
    assert (await run.aio_result()).worker


async def test_a_ticket_that_cannot_be_read_costs_nobody_a_slot(environment: Environment) -> None:
    await environment.worker("double", slots=1)
    await environment.workflows.double.aio_run(environment.workflows.Number(n=1))
    async with await environment.amqp() as connection:
        channel = await connection.channel()
        (pool,) = [q for q in environment.stack.rabbit.ctl("list_queues", "name").split() if environment.namespace in q]
        await channel.default_exchange.publish(aio_pika.Message(b"no ticket"), pool)
        await channel.default_exchange.publish(aio_pika.Message(b'{"t":"ticket","id":"x"}'), pool)
    assert (await environment.workflows.double.aio_run(environment.workflows.Number(n=2))).n == 4


# --- servers that are not there -------------------------------------------------------------------------------


async def test_services_and_workers_that_start_before_their_servers_wait_for_them(
    fresh_stack: Stack, tmp_path_factory: pytest.TempPathFactory
) -> None:
    environment = Environment(fresh_stack, tmp_path_factory.mktemp("environment"))
    try:
        processes = [fresh_stack.launch(service) for service in SERVICES]
        processes.append(environment.launch_worker("double", slots=1))
        for process in processes:
            await eventually(process.health, f"{process} answers")
            assert not process.ready
        await asyncio.to_thread(fresh_stack.rabbit.start)
        await asyncio.sleep(3)
        for process in processes:
            assert process.running
            assert not process.ready, "the database is missing still"
        await asyncio.to_thread(fresh_stack.mongo.start)
        for process in processes:
            await asyncio.to_thread(process.wait_until_ready)
        assert (await environment.workflows.double.aio_run(environment.workflows.Number(n=2))).n == 4
    finally:
        environment.close()
