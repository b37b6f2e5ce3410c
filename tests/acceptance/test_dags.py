"""A task of a DAG takes no ticket and no slot until it can run; and every run comes to an end."""

from __future__ import annotations

from collections import Counter

import aio_pika
import pytest

from acceptance.environment import Environment, eventually, short_delay
from sublet import FailedTaskRunExceptionGroup, RunCancelledError, RunStatus

pytestmark = pytest.mark.real


class TicketWatch:
    """Counts the tickets that the broker hands to the workers of a lab, by RabbitMQ's own tracer."""

    def __init__(self, environment: Environment) -> None:
        self._environment = environment
        self.delivered: Counter[str] = Counter()

    async def __aenter__(self) -> TicketWatch:
        self._environment.stack.rabbit.ctl("trace_on")
        self._connection = await self._environment.amqp()
        channel = await self._connection.channel()
        queue = await channel.declare_queue(exclusive=True)
        await queue.bind("amq.rabbitmq.trace", "deliver.#")
        await queue.consume(self._count, no_ack=True)
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._connection.close()
        self._environment.stack.rabbit.ctl("trace_off")

    async def _count(self, message: aio_pika.abc.AbstractIncomingMessage) -> None:
        queue = (message.routing_key or "").removeprefix("deliver.")
        if queue.startswith(f"sublet.pool.{self._environment.namespace}"):
            self.delivered[queue] += 1

    @property
    def count(self) -> int:
        return self.delivered.total()


async def test_a_task_with_parent_sleep_and_event_gets_one_ticket_when_all_have_come(environment: Environment) -> None:
    await environment.worker("order", "work", slots=1)
    async with TicketWatch(environment) as tickets:
        run = await environment.workflows.order.aio_run(environment.workflows.Number(n=7), wait_for_result=False)
        await environment.until_written("reserved")
        assert tickets.count == 1, "the parent's"
        await environment.client.event.aio_push("approved", {"by": "anna"})
        await short_delay()
        assert tickets.count == 1, "the event has come, but the parent works"

        environment.journal.open_gate("reserve")
        await environment.until_written("shipped")
        assert (await run.aio_result())["ship"] == {"n": 8}
        await environment.until_written("thanked", n=8)
        assert tickets.count == 2, "one ticket when all had come, and kept for the task after it"


async def test_a_task_takes_no_slot_while_its_conditions_are_open(environment: Environment) -> None:
    await environment.worker("order", "double", slots=1)
    run = await environment.workflows.order.aio_run(environment.workflows.Number(n=1), wait_for_result=False)
    environment.journal.open_gate("reserve")
    await environment.until_written("reserved")
    async with TicketWatch(environment) as tickets:
        await environment.client.event.aio_push("approved", {"by": "bertha"})
        await short_delay()
        await short_delay()
        assert tickets.count == 0, "the sleep is over, the event was not the right one"
        assert (await environment.workflows.double.aio_run(environment.workflows.Number(n=4))).n == 8, (
            "the slot is free"
        )
        assert environment.journal.count("shipped") == 0
        await environment.client.event.aio_push("approved", {"by": "anna"})
        assert (await run.aio_result())["ship"] == {"n": 2}
        assert tickets.count == 2


@pytest.mark.parametrize(("n", "skipped"), [(5, ["high"]), (11, ["low"])])
async def test_tasks_are_skipped_by_their_parents_output_and_the_rest_goes_on(
    environment: Environment, n: int, skipped: list[str]
) -> None:
    await environment.worker("maze")
    result = await environment.workflows.maze.aio_run(environment.workflows.Number(n=n))
    assert result["exit_"]["skipped"] == skipped
    assert "was skipped" in result["exit_"]["error"]
    assert result[skipped[0]] == {"skipped": True}
    assert result["detour"] == {"n": 4}
    assert result["after_unlucky"] == {"n": 5}


async def test_a_cancel_condition_cancels_its_task_and_what_depends_on_it(environment: Environment) -> None:
    await environment.worker("maze")
    run = await environment.workflows.maze.aio_run(environment.workflows.Number(n=13), wait_for_result=False)
    await environment.client.event.aio_push("shortcut", {})
    with pytest.raises(RunCancelledError):
        await run.aio_result()
    status = {task.display_name: task.status for task in (await environment.details(run.workflow_run_id)).tasks}
    assert status["unlucky"] == status["after_unlucky"] == RunStatus.CANCELLED
    assert status["exit_"] == RunStatus.COMPLETED, "what does not depend on it goes on"


async def test_after_a_failure_the_on_failure_task_runs_once_and_descendants_never_run(
    environment: Environment,
) -> None:
    await environment.worker("wreck")
    run = await environment.workflows.wreck.aio_run(wait_for_result=False)
    await environment.until_written("rescued")
    environment.journal.open_gate("mast")
    with pytest.raises(FailedTaskRunExceptionGroup) as failed:
        await run.aio_result()
    assert sorted(error.exc for error in failed.value.exceptions) == ["a crack", "a leak"]
    assert environment.journal.count("rescued") == 1
    assert environment.journal.count("loaded") == 0
    tasks = {task.display_name: task for task in (await environment.details(run.workflow_run_id)).tasks}
    assert tasks["cargo"].status == RunStatus.CANCELLED
    assert "ValueError: a leak" in (tasks["rescue-on-failure"].output or {})["first"]


async def test_without_a_failure_the_on_failure_task_is_skipped_and_the_on_success_task_runs(
    environment: Environment,
) -> None:
    await environment.worker("order", slots=2)
    environment.journal.open_gate("reserve")
    run = await environment.workflows.order.aio_run(environment.workflows.Number(n=1), wait_for_result=False)
    await environment.client.event.aio_push("approved", {"by": "anna"})
    await run.aio_result()
    assert environment.journal.count("thanked") == 1


async def test_cancelling_a_run_ends_tasks_that_wait_for_conditions(environment: Environment) -> None:
    await environment.worker("order", slots=1)
    environment.journal.open_gate("reserve")
    run = await environment.workflows.order.aio_run(environment.workflows.Number(n=1), wait_for_result=False)
    await environment.until_written("reserved")
    await environment.client.runs.aio_cancel(run.workflow_run_id)
    with pytest.raises(RunCancelledError):
        await run.aio_result()
    await environment.client.event.aio_push("approved", {"by": "anna"})
    await short_delay()
    assert environment.journal.count("shipped") == 0
    await eventually(
        lambda: environment.stack.metric("scheduler", "sublet_slots", state="taken") == 0, "no slot is taken"
    )


async def test_a_cancelled_run_does_not_run_its_on_failure_task(environment: Environment) -> None:
    await environment.worker("wreck_in_port", slots=1)
    run = await environment.workflows.wreck_in_port.aio_run(wait_for_result=False)
    await environment.until_written("anchored")
    await environment.client.runs.aio_cancel(run.workflow_run_id)
    with pytest.raises(RunCancelledError):
        await run.aio_result()
    await short_delay()
    assert environment.journal.count("rescued") == 0
