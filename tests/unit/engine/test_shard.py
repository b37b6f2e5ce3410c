"""A shard that is dropped at any moment and built again from what was committed loses nothing."""

from __future__ import annotations

import pytest

from sublet_protocol import limits
from sublet_protocol.destinations import Inbox
from sublet_protocol.messages import (
    ChildFinished,
    EventMatched,
    Evicted,
    Goodbye,
    Grant,
    ParentLink,
    Recorded,
    RunRequest,
    RunResult,
    SetTimer,
    ShardMessage,
    Subscribe,
    Tick,
    TimerFired,
)
from sublet_protocol.specs import TaskSpec
from support.engine_builders import NOW, POOL, event, raw, run_op, sleep, wait_op, workflow
from support.shard_harness import Sent, ShardHarness, claim, evicted, failed, finished, heartbeat, inbox_of

FLOW = workflow("task")
DURABLE = workflow(TaskSpec("task", durable=True), name="durable")
RETRIED = workflow(TaskSpec("task", retries=1, backoff_factor=5, execution_timeout_s=20), name="retried")
PARENT = ParentLink("parent.task", "0")


def world() -> ShardHarness:
    made = ShardHarness(FLOW, DURABLE, RETRIED)
    made.hello()
    return made


def crash_before_publishing(there: ShardHarness) -> None:
    """The batch is committed, its messages are neither published nor acknowledged."""
    there.commit()
    there.take_over()


# --- what is ready or runs --------------------------------------------------------------------------------------


def test_ready_tasks_get_new_tickets_from_the_next_owner() -> None:
    there = world()
    there.request("a")
    there.take_over()
    there.heartbeat()
    (ticket,) = there.tickets()
    assert there.claim(ticket) is not None


def test_tickets_of_the_last_owner_are_served_by_the_next() -> None:
    there = world()
    there.request("a")
    (ticket,) = there.tickets()
    there.take_over()
    assert there.claim(ticket) is not None


def test_running_tasks_go_on_and_their_results_are_taken_by_the_next_owner() -> None:
    there = world()
    grant = there.granted("a")
    there.take_over()
    there.heartbeat("w1", grant.lease)
    there.tick(limits.WORKER_LOST_S - 1)
    there.finish(grant, 1)
    assert there.task("a").output == "1"


def test_a_worker_that_does_not_speak_to_the_next_owner_loses_its_leases() -> None:
    there = world()
    there.granted("a")
    there.take_over()
    there.tick(limits.WORKER_LOST_S + 1)
    assert there.task("a").status == "READY"


def test_a_worker_keeps_its_name_and_age_under_the_next_owner() -> None:
    there = world()
    there.take_over()
    there.shard.load_worker("w1", POOL, inbox_of("w1"), {"task": 1}, name="printer", started_at=NOW - 60)
    there.now += limits.WORKER_SAVE_INTERVAL_S + 1
    there.decide(heartbeat())
    (saved,) = there.commit().workers
    assert (saved.worker.name, saved.worker.started_at) == ("printer", NOW - 60)


def test_a_grant_that_was_committed_but_never_sent_is_sent_when_the_claim_comes_again() -> None:
    there = world()
    there.request("a")
    (ticket,) = there.tickets()
    there.decide(claim(ticket))
    crash_before_publishing(there)
    grant = there.claim(ticket)
    assert grant is not None
    assert grant.lease == "a.task@1"


def test_a_grant_that_was_never_committed_never_was() -> None:
    there = world()
    there.request("a")
    (ticket,) = there.tickets()
    there.decide(claim(ticket))
    there.take_over()
    grant = there.claim(ticket)
    assert grant is not None
    assert grant.lease == "a.task@1"


def test_a_message_for_a_run_whose_definition_is_not_loaded_is_not_acknowledged() -> None:
    there = world()
    grant = there.granted("a")
    there._workflows.clear()
    there.take_over()
    with pytest.raises(LookupError, match="workflow 'flow' is needed for run a"):
        there.finish(grant)


def test_the_next_owner_knows_the_deadlines_and_expires_them_after_it_has_listened() -> None:
    there = world()
    grant = there.granted("a", workflow="retried")
    there.now += 60
    there.take_over()
    there.tick()
    there.heartbeat("w1", grant.lease)
    there.tick(limits.WORKER_SILENT_S - 2)
    there.heartbeat("w1", grant.lease)
    assert there.task("a").status == "RUNNING"
    there.tick(1)
    assert there.task("a").status == "BACKOFF"


@pytest.mark.parametrize("taken_over", [False, True])
def test_delayed_heartbeats_of_a_lost_worker_do_not_make_its_task_a_timeout(taken_over: bool) -> None:
    """They were said before the outage in which it died, and stood in the queue with it."""
    there = world()
    grant = there.granted("a", workflow="retried")
    there.now += 60
    if taken_over:
        there.take_over()
    there.handle(heartbeat("w1", grant.lease), Tick(there.now))
    for _ in range(int(limits.WORKER_LOST_S)):
        there.tick()
        assert there.task("a").status == "RUNNING"
    there.tick()
    assert (there.task("a").status, there.task("a").losses) == ("READY", 1)


def test_a_retained_ticket_remains_valid_under_the_next_owner() -> None:
    there = world()
    grant = there.granted("a")
    there.request("b")
    there.take_over()
    (following,) = there.finish(grant, next=True).of(Grant)
    assert following.ticket == grant.ticket


# --- the outbox -------------------------------------------------------------------------------------------------

REPEATED: dict[str, type] = {
    "the result for a watcher": RunResult,
    "the end of a child": ChildFinished,
    "a retry": SetTimer,
    "a sleep": SetTimer,
    "an event wait": Subscribe,
    "a child": RunRequest,
}


def cause(there: ShardHarness, what: str) -> ShardMessage:
    """Bring a run to where the message returned has that effect."""
    match what:
        case "the result for a watcher":
            grant = there.granted("a", reply_to="me")
            return finished(grant)
        case "the end of a child":
            grant = there.granted("a", parent=PARENT)
            return finished(grant)
        case "a retry":
            grant = there.granted("a", workflow="retried")
            return failed(grant)
    there.request("a", "durable")
    durable_grant = there.claim(there.tickets(kind="durable")[0], kind="durable")
    assert durable_grant is not None
    operation = {"a sleep": wait_op("0", sleep()), "an event wait": wait_op("0", event()), "a child": run_op("0")}[what]
    return evicted(durable_grant, operation)


@pytest.mark.parametrize("what", REPEATED)
def test_an_effect_that_was_committed_but_not_published_is_published_when_its_cause_comes_again(what: str) -> None:
    there = world()
    message = cause(there, what)
    there.decide(message)
    crash_before_publishing(there)
    sent = there.handle(message)
    assert len(sent.of(REPEATED[what])) == 1


@pytest.mark.parametrize("what", REPEATED)
def test_an_effect_survives_two_crashes_in_a_row(what: str) -> None:
    """The second batch changes the run once more, and is committed but not published either."""
    there = world()
    message = cause(there, what)
    there.decide(message)
    crash_before_publishing(there)
    there.decide(message, RunRequest("a", "", reply_to="second"))
    crash_before_publishing(there)
    sent = there.handle(message, RunRequest("a", "", reply_to="second"))
    assert sent.of(REPEATED[what])


@pytest.mark.parametrize("how", ["the clock", "a lost worker", "a goodbye", "an unseen grant"])
def test_an_effect_that_no_message_about_the_run_caused_is_found_by_the_next_owner(how: str) -> None:
    there = world()
    there.granted("a", workflow="retried", reply_to="me") if how == "the clock" else _about_to_fail(there, "a")
    _let_happen(there, how)
    assert there.task("a").status in ("BACKOFF", "FAILED")
    there.take_over()
    sent = there.tick()
    assert [*sent.of(SetTimer), *sent.of(RunResult, Inbox("me"))]
    there.tick()
    there.take_over()
    assert not there.tick().of(SetTimer)


def _about_to_fail(there: ShardHarness, run_id: str) -> None:
    """One more loss, and it fails."""
    grant = there.granted(run_id, reply_to="me")
    for _ in range(limits.MAX_LOSSES):
        there.goodbye()
        there.hello()
        claimed = there.claim(grant.ticket)
        assert claimed is not None


def _let_happen(there: ShardHarness, how: str) -> None:
    """The batch in which the task fails is committed, and not published."""
    for _ in range(60):
        there.now += 1
        there.decide(*_what_comes(there, how))
        batch = there.commit()
        if there.task("a").status in ("BACKOFF", "FAILED"):
            return
        there.publish(batch)


def _what_comes(there: ShardHarness, how: str) -> list[ShardMessage]:
    """In each second."""
    match how:
        case "the clock":
            return [Tick(there.now), heartbeat("w1", "a.task@1")]
        case "a lost worker":
            return [Tick(there.now)]
        case "a goodbye":
            return [Goodbye("w1")]
        case _:
            return [Tick(there.now), heartbeat()]


def test_the_owner_that_wrote_an_outbox_does_not_publish_it_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "RUN_CACHE_MAX", 0)
    there = world()
    grant = there.granted("a", reply_to="me")
    there.finish(grant)
    assert "a" not in there.shard.state.runs
    assert not there.handle(finished(grant)).of(RunResult, Inbox("me"))


def test_the_next_owner_publishes_an_outbox_once_however_often_it_loads_the_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two runs that ask each other would never come to rest."""
    monkeypatch.setattr(limits, "RUN_CACHE_MAX", 0)
    there = world()
    grant = there.granted("a", reply_to="me")
    there.finish(grant)
    there.take_over()
    assert there.handle(finished(grant)).of(RunResult, Inbox("me"))
    assert "a" not in there.shard.state.runs
    assert not there.handle(finished(grant)).of(RunResult, Inbox("me"))
    there.take_over()
    assert there.handle(finished(grant)).of(RunResult, Inbox("me"))


def test_what_was_never_committed_is_not_published() -> None:
    there = world()
    grant = there.granted("a", reply_to="me")
    there.decide(finished(grant))
    there.take_over()
    assert not there.tick().of(RunResult)
    assert there.finish(grant).of(RunResult, Inbox("me"))


def test_unconfirmed_messages_are_not_stored() -> None:
    there = world()
    there.granted("a")
    run = there.run("a")
    assert run is not None
    assert run.outbox == ()


# --- any moment -------------------------------------------------------------------------------------------------

STORY = ["request", "grant", "evict", "event", "grant again", "record", "timer", "finish"]


@pytest.mark.parametrize("published", [True, False], ids=["lost before the commit", "lost before publishing"])
@pytest.mark.parametrize("moment", range(len(STORY)), ids=STORY)
def test_a_crash_at_any_moment_of_a_durable_task_changes_nothing(moment: int, published: bool) -> None:
    """Every message is delivered; the one at ``moment`` is handled by an owner that crashes, and comes again."""
    there = world()
    grants: list[Grant] = []
    received = Sent()
    for number, step in enumerate(STORY):
        message = _message(step, grants)
        if number == moment:
            there.decide(message)
            if not published:
                there.commit()
            there.take_over()
        received += there.handle(message)
        grants += [grant for grant in there.sent.of(Grant) if grant not in grants]
    run = there.run("a")
    assert run is not None
    assert (run.status, run.task("task").invocation, run.task("task").completed_count) == ("COMPLETED", 2, 2)
    assert [grant.invocation for grant in grants] == [1, 2]
    assert len(received.of(RunResult, Inbox("me"))) == 1
    assert {timer.id for timer in received.of(SetTimer)} == {"a.task#1#sleep"}
    assert {wait.id for wait in received.of(Subscribe)} == {"a.task#0#paid"}
    assert [entry.operation_id for entry in there.log_of("a.task") if entry.done] == ["0", "1"]


def _message(step: str, grants: list[Grant]) -> ShardMessage:
    match step:
        case "request":
            return RunRequest("a", "durable", reply_to="me")
        case "grant":
            return claim("t1", kind="durable")
        case "evict":
            return Evicted(grants[0].lease, "t1", (wait_op("0", event()),), (("0",),), 0)
        case "event":
            return EventMatched("a.task", "0", "paid", "event-1", 1, raw({}))
        case "grant again":
            return claim("t2", kind="durable")
        case "record":
            return Recorded(grants[1].lease, (wait_op("1", sleep()),), waiting=True, number=1)
        case "timer":
            return TimerFired("a.task", "1", "sleep")
        case _:
            return finished(grants[1], "done")
