"""Workers: liveness, their leases, lost messages, the routing of tasks to pools, and deadlines."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from sublet_protocol import limits
from sublet_protocol.destinations import Inbox
from sublet_protocol.messages import (
    CancelRun,
    ChildFinished,
    EventMatched,
    Goodbye,
    Grant,
    HeldLease,
    Hello,
    ParentLink,
    Recorded,
    RegisterTriggers,
    ReplayRun,
    Reply,
    Revoked,
    RunRequest,
    RunResult,
    SetTimer,
    SlotReleased,
    Tick,
    TimeoutExtended,
    TimerFired,
    WatchRun,
)
from sublet_protocol.specs import TaskSpec
from support.engine_builders import POOL, event, memo_op, raw, run_op, wait_op, workflow
from support.shard_harness import ShardHarness, claim, evicted, failed, finished, heartbeat, inbox_of

FLOW = workflow("task")
DURABLE = workflow(TaskSpec("task", durable=True), name="durable")


def world(slots: int = 1, workers: int = 1) -> ShardHarness:
    made = ShardHarness(FLOW, DURABLE)
    for number in range(1, workers + 1):
        made.hello(f"w{number}", slots=slots)
    return made


def durable_grant(there: ShardHarness, run_id: str = "a") -> Grant:
    there.request(run_id, "durable")
    grant = there.claim(there.tickets(kind="durable")[0], kind="durable")
    assert grant is not None
    return grant


# --- silence and loss -------------------------------------------------------------------------------------------


def test_a_silent_worker_loses_its_leases_after_a_while_and_another_takes_over() -> None:
    there = world(workers=2)
    grant = there.granted("a", "w1")
    for _ in range(int(limits.WORKER_LOST_S)):
        there.tick()
        there.heartbeat("w2")
    assert there.task("a").status == "RUNNING"
    there.tick()
    assert there.task("a").status == "READY"
    again = there.claim("t2", "w2")
    assert again is not None
    assert again.lease != grant.lease


def test_a_lost_worker_that_returns_gets_a_revocation_and_its_result_is_ignored() -> None:
    there = world()
    grant = there.granted("a")
    there.tick(limits.WORKER_LOST_S + 1)
    assert there.heartbeat("w1", grant.lease).of(Revoked) == [Revoked(grant.lease, "superseded")]
    there.finish(grant)
    assert there.task("a").status == "READY"


def test_a_worker_that_says_goodbye_loses_what_it_still_holds_at_once() -> None:
    there = world(workers=2)
    there.granted("a", "w1")
    there.goodbye("w1")
    assert there.task("a").status == "READY"
    assert len(there.tickets()) == 1
    assert not there.goodbye("w1")


def test_a_released_task_is_recovered_when_its_worker_dies() -> None:
    there = world()
    grant = there.granted("a")
    there.handle(SlotReleased(grant.lease))
    there.tick(limits.WORKER_LOST_S + 1)
    assert there.task("a").status == "READY"


def test_a_heartbeat_or_a_report_is_a_sign_of_life() -> None:
    there = world(workers=2)
    first, second = there.granted("a", "w1"), there.granted("b", "w2")
    there.tick(limits.WORKER_LOST_S - 1)
    there.heartbeat("w1", first.lease)
    there.finish(second)
    there.tick(limits.WORKER_LOST_S - 1)
    assert there.task("a").status == "RUNNING"


def test_workers_are_not_blamed_for_our_own_delay() -> None:
    """The shard stood still for a minute: the ticks and heartbeats of that minute come in one batch."""
    there = world()
    grant = there.granted("a")
    began = there.now
    there.now += 60
    late = [m for second in range(60) for m in (Tick(began + second), heartbeat("w1", grant.lease))]
    there.handle(*late)
    assert there.task("a").status == "RUNNING"


def test_nobody_is_blamed_for_an_outage_in_which_nobody_could_be_heard() -> None:
    there = world()
    grant = there.granted("a")
    there.now += 3_600
    there.handle(Tick(there.now))
    assert there.task("a").status == "RUNNING"
    there.finish(grant)
    assert there.task("a").status == "COMPLETED"


def test_a_worker_that_died_in_an_outage_is_found_afterwards() -> None:
    there = world()
    there.granted("a")
    there.now += 3_600
    there.tick(limits.WORKER_LOST_S + 2)
    assert there.task("a").status == "READY"


# --- leases compared --------------------------------------------------------------------------------------------


def test_a_lease_that_has_ended_is_revoked_when_its_worker_still_lists_it() -> None:
    there = world()
    grant = there.granted("a")
    there.cancel("a")
    assert there.heartbeat("w1", grant.lease).of(Revoked) == [Revoked(grant.lease, "superseded")]


def test_a_lease_of_a_finished_run_that_is_not_in_memory_is_revoked() -> None:
    there = world()
    grant = there.granted("a")
    there.cancel("a")
    there.take_over()
    assert "a" not in there.shard.state.runs
    assert there.heartbeat("w1", grant.lease).of(Revoked) == [Revoked(grant.lease, "superseded")]


def test_the_leases_of_other_shards_are_none_of_our_business() -> None:
    there = world()
    there.shard.state.shards = 64  # every worker tells every shard of all its leases
    foreign = next(f"{n}.task@1" for n in range(1_000) if not there.shard.state.owns(str(n)))
    assert not there.heartbeat("w1", foreign).of(Revoked)


@pytest.mark.parametrize("nonsense", ["", "x", "a.b.c", "@@", "a.task@99", "a.task@x"])
def test_a_lease_that_never_was_is_revoked_and_harms_nobody(nonsense: str) -> None:
    there = world()
    there.granted("a")
    assert there.heartbeat("w1", nonsense).of(Revoked) == [Revoked(nonsense, "superseded")]
    assert there.task("a").status == "RUNNING"


def test_a_grant_that_its_worker_never_lists_was_lost_on_the_way() -> None:
    there = world()
    there.granted("a")
    for _ in range(int(limits.GRANT_UNSEEN_S)):
        there.tick()
        there.heartbeat()
    assert there.task("a").status == "RUNNING"
    there.tick(2)
    there.heartbeat()
    assert there.task("a").status == "READY"
    assert there.shard.state.counters.anomalies["grant_unseen"] == ["a.task@1"]


def test_heartbeats_that_were_sent_before_the_grant_and_come_late_do_not_count_against_it() -> None:
    there = world()
    grant = there.granted("a")
    there.tick(limits.GRANT_UNSEEN_S + 5)
    there.handle(heartbeat(), heartbeat(), heartbeat("w1", grant.lease))
    assert there.task("a").status == "RUNNING"


def test_a_worker_that_lists_its_lease_again_is_trusted_again() -> None:
    there = world()
    grant = there.granted("a")
    there.heartbeat()
    there.tick(limits.GRANT_UNSEEN_S)
    there.heartbeat("w1", grant.lease)
    there.tick(limits.GRANT_UNSEEN_S)
    there.heartbeat()
    assert there.task("a").status == "RUNNING"


# --- results that got lost on the way ---------------------------------------------------------------------------


def test_a_result_that_a_resident_task_has_not_seen_for_a_while_is_sent_again() -> None:
    there = world()
    grant = durable_grant(there)
    there.handle(Recorded(grant.lease, (wait_op("0", event()),), waiting=True, number=1))
    there.handle(_matched(grant, "0"))
    there.decide(heartbeat("w1", HeldLease(grant.lease, delivered=0)))
    assert not there.commit().resends
    there.tick(limits.HEARTBEAT_INTERVAL_S + 1)
    there.decide(heartbeat("w1", HeldLease(grant.lease, delivered=0)))
    (resend,) = there.commit().resends
    assert (resend.lease, resend.delivered) == (grant.lease, 0)


def test_a_result_is_sent_again_although_the_task_keeps_recording_other_things() -> None:
    there = world()
    grant = durable_grant(there)
    there.handle(Recorded(grant.lease, (wait_op("0", event()),), number=1))
    there.handle(_matched(grant, "0"))
    for number in range(2, 5):
        there.tick(2)
        there.handle(Recorded(grant.lease, (memo_op(str(number)),), number=number))
    there.decide(heartbeat("w1", HeldLease(grant.lease, delivered=0)))
    assert len(there.commit().resends) == 1


@pytest.mark.parametrize("delivered", [1, -1])
def test_nothing_is_sent_again_to_a_task_that_has_it_or_has_not_begun(delivered: int) -> None:
    there = world()
    grant = durable_grant(there)
    there.handle(Recorded(grant.lease, (wait_op("0", event()),), waiting=True, number=1))
    there.handle(_matched(grant, "0"))
    there.tick(limits.HEARTBEAT_INTERVAL_S + 1)
    there.decide(heartbeat("w1", HeldLease(grant.lease, delivered)))
    assert not there.commit().resends


def _matched(grant: Grant, operation_id: str) -> EventMatched:
    return EventMatched(grant.lease.partition("@")[0], operation_id, "paid", "event-1", 1, raw({}))


# --- pools ------------------------------------------------------------------------------------------------------


def test_work_goes_to_the_latest_pool_that_lives() -> None:
    there = ShardHarness(FLOW)
    there.hello("old", "old-pool", at=1)
    there.hello("new", "new-pool", at=2)
    there.request("a")
    assert len(there.tickets("new-pool")) == 1
    assert there.tickets("old-pool") == []


def test_ready_tasks_of_a_lost_pool_move_to_a_pool_that_can_run_them() -> None:
    there = ShardHarness(FLOW)
    there.hello("old", "old-pool", at=1)
    there.hello("new", "new-pool", at=2)
    there.request("a")
    there.goodbye("new")
    assert len(there.tickets("old-pool")) == 1
    assert there.handle(claim("t1", "old", pool="old-pool")).of(Grant)


def test_work_of_a_pool_that_fell_silent_moves_with_the_next_sweep() -> None:
    there = ShardHarness(FLOW)
    there.hello("old", "old-pool", at=1)
    there.hello("new", "new-pool", at=2)
    there.request("a")
    issued = 0
    for _ in range(int(limits.WORKER_SILENT_S + limits.SWEEP_INTERVAL_S) + 2):
        there.tick()
        issued += len(there.tickets("old-pool"))
        there.handle(heartbeat("old", pool="old-pool"))
        issued += len(there.tickets("old-pool"))
    assert issued == 1


def test_work_that_nobody_can_do_waits_for_a_pool_that_can() -> None:
    there = ShardHarness(FLOW)
    there.handle(Hello("w1", "elsewhere", "main", inbox_of("w1"), 1, 1, (FLOW,), 1.0))
    there.goodbye("w1")
    there.request("a")
    assert there.tickets("elsewhere") == []
    there.hello("w2", POOL, at=2)
    assert len(there.tickets()) == 1


def test_a_run_keeps_the_version_it_began_with() -> None:
    two = workflow("task", TaskSpec("more", parents=("task",)))
    there = ShardHarness(FLOW)
    there.hello(at=1)
    there.request("before")
    there.hello("w2", workflows=(two,), at=2)
    there.flows["flow"] = two
    there.request("after")
    assert [run.version for run in (there.run("before"), there.run("after")) if run] == [FLOW.version, two.version]


def test_an_older_worker_that_says_hello_late_does_not_bring_its_version_back() -> None:
    two = workflow("task", TaskSpec("more", parents=("task",)))
    there = ShardHarness(two)
    there.hello("new", at=2)
    there.hello("old", workflows=(FLOW,), at=1)
    there.request("a")
    assert len(there.run("a").tasks) == 2  # type: ignore[union-attr]


def test_the_first_shard_registers_triggers_and_saves_workers() -> None:
    there = ShardHarness(workflow("task", on_events=("order.*",)))
    sent = there.hello(at=5)
    assert sent.of(RegisterTriggers) == [RegisterTriggers("flow", ("order.*",), (), 5)]
    there.decide(heartbeat())
    assert there.commit().workers == []
    there.tick(limits.WORKER_SAVE_INTERVAL_S + 1)
    there.decide(heartbeat())
    assert [change.worker.id for change in there.commit().workers] == ["w1"]
    there.decide(Goodbye("w1"))
    assert [change.gone for change in there.commit().workers] == [True]


def test_a_worker_known_to_earlier_owners_only_is_saved_as_gone_with_a_time() -> None:
    there = world()
    there.granted("a")
    there.take_over()
    there.decide(Goodbye("w1"))
    (change,) = there.commit().workers
    assert (change.gone, change.worker.silent_since) == (True, there.now)


# --- deadlines --------------------------------------------------------------------------------------------------


def test_a_task_that_runs_for_too_long_is_stopped_by_the_scheduler_in_the_end() -> None:
    there = ShardHarness(workflow(TaskSpec("task", execution_timeout_s=20)))
    there.hello()
    grant = there.granted("a")
    for _ in range(23):
        there.tick()
        there.heartbeat("w1", grant.lease)
        status = there.task("a").status
    assert status == "FAILED"
    assert there.task("a").error.type == "TimeoutError"  # type: ignore[union-attr]


def test_a_worker_lost_shortly_before_a_deadline_is_no_timeout() -> None:
    there = ShardHarness(workflow(TaskSpec("task", execution_timeout_s=20)))
    there.hello()
    there.granted("a")
    there.tick(limits.WORKER_LOST_S + 1)
    assert there.task("a").status == "READY"


def test_a_lost_grant_is_sent_again_after_its_deadline_and_is_no_timeout() -> None:
    """Takeovers forget since when the worker does not list it: so the deadline comes first."""
    there = ShardHarness(workflow(TaskSpec("task", execution_timeout_s=20)))
    there.hello()
    there.granted("a")
    there.tick(15)
    there.take_over()
    for _ in range(30):
        there.tick()
        there.heartbeat("w1")
        if there.task("a").lease is None:
            break
    assert (there.task("a").status, there.task("a").losses) == ("READY", 1)


def test_a_report_that_arrived_before_the_deadline_counts_although_it_is_handled_late() -> None:
    there = ShardHarness(workflow(TaskSpec("task", execution_timeout_s=20)))
    there.hello()
    grant = there.granted("a")
    began = there.now
    there.now += 100
    ticks = [Tick(began + second) for second in range(1, 100)]
    there.handle(*ticks[:15], finished(grant, "in time"), *ticks[15:])
    assert there.task("a").output == '"in time"'


def test_a_report_is_waited_for_after_an_outage_of_the_broker() -> None:
    there = ShardHarness(workflow(TaskSpec("task", execution_timeout_s=20)))
    there.hello()
    grant = there.granted("a")
    there.now += 100
    there.handle(Tick(there.now))
    there.tick(2)
    there.finish(grant, "said in the outage")
    assert there.task("a").output == '"said in the outage"'


def test_a_task_without_a_slot_is_cancelled_at_its_schedule_timeout() -> None:
    there = ShardHarness(workflow(TaskSpec("task", schedule_timeout_s=20)))
    there.hello()
    there.request("a", reply_to="me")
    assert not there.tick(19).of(RunResult)
    (result,) = there.tick(1).of(RunResult, Inbox("me"))
    assert result.status == "CANCELLED"


def test_a_moved_deadline_expires_at_its_new_time_only() -> None:
    there = ShardHarness(workflow(TaskSpec("task", execution_timeout_s=20)))
    there.hello()
    grant = there.granted("a")
    there.handle(TimeoutExtended(grant.lease, 20, number=1))
    for _ in range(40):
        there.tick()
        there.heartbeat("w1", grant.lease)
    assert there.task("a").status == "RUNNING"
    for _ in range(3):
        there.tick()
        there.heartbeat("w1", grant.lease)
    assert there.task("a").status == "FAILED"


# --- requests ---------------------------------------------------------------------------------------------------


def test_a_run_that_was_requested_twice_is_one_run() -> None:
    there = world()
    there.handle(RunRequest("a", "flow", reply_to="me"), RunRequest("a", "flow", reply_to="me"))
    grant = there.claim(there.tickets()[0])
    assert grant is not None
    assert len(there.finish(grant).of(RunResult, Inbox("me"))) == 1


def test_a_run_id_that_would_be_ambiguous_is_refused() -> None:
    with pytest.raises(ValueError, match="contains a dot"):
        world().request("a.b")


def test_an_unknown_run_is_answered_as_such() -> None:
    there = world()
    assert there.handle(WatchRun("ghost", "me")).of(RunResult) == [RunResult("ghost", None)]
    (reply,) = there.handle(CancelRun("ghost", reply_to="me", correlation_id="1")).of(Reply)
    assert reply.error == "there is no run ghost"
    (reply,) = there.handle(ReplayRun("ghost", reply_to="me", correlation_id="2")).of(Reply)
    assert reply.error == "there is no run ghost"


def test_messages_for_runs_that_do_not_exist_are_ignored() -> None:
    there = world()
    strays = (
        TimerFired("ghost.task", "0", "sleep"),
        ChildFinished("ghost.task", "0", "child", "COMPLETED"),
        TimerFired("nonsense", "", ""),
    )
    assert not there.handle(*strays)


def test_cancelling_one_task_leaves_the_rest_of_its_run() -> None:
    there = ShardHarness(workflow("a", "b"))
    there.hello()
    there.request("run")
    (reply,) = there.handle(CancelRun("run", "run.a", reply_to="me", correlation_id="1")).of(Reply)
    assert reply.error is None
    assert [there.task("run", name).status for name in "ab"] == ["CANCELLED", "READY"]


def test_a_replay_that_is_asked_for_twice_happens_once() -> None:
    there = world()
    grant = there.granted("a")
    there.finish(grant)
    replay = ReplayRun("a", reply_to="me", correlation_id="1")
    first, second = there.handle(replay, replay).of(Reply)
    assert first.error is second.error is None
    again = there.claim("t2")
    assert again is not None
    there.finish(again)
    there.handle(replay)
    assert there.task("a").status == "COMPLETED"
    there.handle(replace(replay, correlation_id="2"))
    assert there.task("a").status == "READY"


def test_a_run_that_is_not_finished_is_not_replayed_and_the_reply_says_why() -> None:
    there = world()
    there.request("a")
    (reply,) = there.handle(ReplayRun("a", reply_to="me", correlation_id="1")).of(Reply)
    assert "only a finished run" in (reply.error or "")


def test_a_child_of_the_same_shard_wakes_its_parent() -> None:
    there = world()
    grant = durable_grant(there, "parent")
    sent = there.handle(evicted(grant, run_op("0", "flow")))
    (request,) = sent.of(RunRequest)
    assert request.parent == ParentLink("parent.task", "0")
    there.handle(request)
    child = there.claim(there.tickets()[0])
    assert child is not None
    (told,) = there.finish(child, 7).of(ChildFinished)
    there.handle(told)
    there.handle(told)
    assert there.task("parent").status == "READY"
    again = there.claim("t9", kind="durable")
    assert again is not None
    assert [bytes(entry.done.result) for entry in again.log if entry.done] == [b"7"]


def test_a_failed_attempt_waits_for_its_timer() -> None:
    there = ShardHarness(workflow(TaskSpec("task", retries=1, backoff_factor=5)))
    there.hello()
    grant = there.granted("a")
    (timer,) = there.handle(failed(grant)).of(SetTimer)
    assert timer.due == there.now + 5
    there.handle(TimerFired(timer.task_run_id, timer.operation_id, timer.key))
    assert len(there.tickets()) == 1


def test_runs_that_wait_or_are_over_leave_memory_when_there_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "RUN_CACHE_MAX", 2)
    there = world()
    for run_id in "abc":
        there.finish(there.granted(run_id, ticket=run_id))
    there.granted("running", ticket="running")
    assert list(there.shard.state.runs) == ["b", "c", "running"]
    assert there.handle(WatchRun("a", "me")).of(RunResult)[0].status == "COMPLETED"
