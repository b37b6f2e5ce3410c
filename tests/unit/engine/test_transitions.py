"""The life of ordinary tasks: attempts, losses, cancelling, timeouts, replay, and what those who watch are told."""

from __future__ import annotations

import msgspec
import pytest

from sublet_engine.run import transitions
from sublet_engine.run.effects import Effects, position_at
from sublet_engine.run.state import Run
from sublet_protocol import limits
from sublet_protocol.destinations import Inbox, Ingest, Notice
from sublet_protocol.messages import (
    CancelTimer,
    ChildFinished,
    ParentLink,
    Revoked,
    RunRequest,
    RunResult,
    SetTimer,
    Subscribe,
    TaskNotice,
    TimerFired,
)
from sublet_protocol.specs import TaskSpec
from support.engine_builders import (
    INBOX,
    NOW,
    RUN_ID,
    RunHarness,
    both,
    event,
    parent,
    record_of,
    sleep,
    wait_op,
    workflow,
)

PARENT = ParentLink("parent-run.task", "3")


def after(bench: RunHarness, step: str) -> None:
    """Bring the only task to an end, or back to ready."""
    lease = bench.lease()
    {
        "finish": lambda: bench.finish(lease),
        "fail": lambda: bench.fail(lease, retryable=False),
        "retry": lambda: bench.fail(lease),
        "lose": lambda: bench.worker_lost(lease),
        "hand back": lambda: bench.grant_declined(lease),
        "time out": bench.time_out,
        "cancel": bench.cancel,
    }[step]()


ENDS_OF_A_LEASE = ["finish", "fail", "retry", "lose", "hand back", "time out", "cancel"]

# --- creation ---------------------------------------------------------------------------------------------------


def test_a_run_of_an_unknown_workflow_fails_and_client_and_parent_are_notified() -> None:
    effects = Effects(NOW)
    run = transitions.create(RunRequest(RUN_ID, "ghost", reply_to="me", parent=PARENT), None, effects)
    assert run.status == "FAILED"
    result = next(record_of(message) for message in effects.messages if message.to == Inbox("me"))
    told = next(record for record in map(record_of, effects.messages) if isinstance(record, ChildFinished))
    assert isinstance(result, RunResult)
    assert result.errors[0].type == "UnknownWorkflow"
    assert told.error is not None
    assert "ghost" in told.error.message


def test_a_run_takes_the_priority_of_its_request_before_that_of_its_workflow() -> None:
    flow = workflow("task", default_priority=2)
    assert RunHarness(spec=flow).run.priority == 2
    assert RunHarness(spec=flow, priority=3).run.priority == 3


@pytest.mark.parametrize(("asked", "begun"), [(0.0, NOW), (NOW - 60, NOW - 60), (NOW + 60, NOW)])
def test_a_run_begins_when_it_was_asked_for_and_hears_events_from_then_on(asked: float, begun: float) -> None:
    spec = workflow(TaskSpec("task", wait_for=both(event())))
    bench = RunHarness(spec=spec, requested_at=asked)
    assert bench.run.created_at == begun
    (subscribe,) = bench.sent(Subscribe, Ingest())
    assert subscribe.since == position_at(begun)


# --- attempts ---------------------------------------------------------------------------------------------------


def test_a_task_that_returns_completes_its_run_with_its_output() -> None:
    bench = RunHarness("task", reply_to="me")
    bench.run_task("task", {"n": 1})
    (result,) = bench.sent(RunResult, Inbox("me"))
    assert result.status == "COMPLETED"
    assert {name: msgspec.json.decode(output) for name, output in result.outputs.items()} == {"task": {"n": 1}}


def test_a_failure_is_retried_at_once_as_often_as_the_task_says() -> None:
    bench = RunHarness(TaskSpec("task", retries=2))
    for attempt in (1, 2):
        bench.fail(bench.grant())
        assert bench.status() == "READY"
        assert bench.task().retry_count == attempt
    bench.fail(bench.grant())
    assert bench.status() == "FAILED"
    assert bench.run.status == "FAILED"


def test_a_failure_that_is_retried_is_not_announced() -> None:
    bench = RunHarness(TaskSpec("task", retries=1), reply_to="me", parent=PARENT)
    bench.fail(bench.grant())
    assert not bench.messages


def test_a_failure_that_must_not_be_retried_is_final() -> None:
    bench = RunHarness(TaskSpec("task", retries=5))
    bench.fail(bench.grant(), retryable=False)
    assert bench.status() == "FAILED"


def test_the_last_error_is_the_one_that_counts_and_names_its_task() -> None:
    bench = RunHarness(TaskSpec("task", retries=1))
    bench.fail(bench.grant(), kind="First")
    bench.fail(bench.grant(), kind="Second")
    assert bench.error().type == "Second"
    assert bench.error().task_run_id == bench.task_run()


def test_a_success_after_a_retry_leaves_no_error() -> None:
    bench = RunHarness(TaskSpec("task", retries=1))
    bench.fail(bench.grant())
    bench.run_task("task")
    assert bench.run.status == "COMPLETED"
    assert bench.task().error is None


def test_a_retry_with_backoff_waits_for_its_timer() -> None:
    bench = RunHarness(TaskSpec("task", retries=2, backoff_factor=3))
    bench.fail(bench.grant())
    assert bench.status() == "BACKOFF"
    (timer,) = bench.sent(SetTimer)
    assert timer.due == NOW + 3
    bench.fire(timer.operation_id, timer.key)
    assert bench.status() == "READY"
    bench.fail(bench.grant())
    assert bench.sent(SetTimer)[0].due == NOW + 9


def test_the_timer_of_an_earlier_retry_does_not_end_a_later_backoff() -> None:
    bench = RunHarness(TaskSpec("task", retries=2, backoff_factor=3))
    bench.fail(bench.grant())
    (timer,) = bench.sent(SetTimer)
    bench.fire(timer.operation_id, timer.key)
    bench.fail(bench.grant())
    assert bench.changes_nothing(lambda: bench.fire(timer.operation_id, timer.key))


@pytest.mark.parametrize(
    ("factor", "most_s", "retry", "delay_s"),
    [
        (2, None, 1, 2),
        (2, None, 10, 1024),
        (2, 60, 10, 60),
        (2, None, 100_000, limits.BACKOFF_MAX_S),
        (2, 7, 100_000, 7),
        (1.5, None, 2, 2.25),
        (0, None, 3, 0),
    ],
)
def test_the_delay_before_a_retry_grows_up_to_its_maximum_and_never_overflows(
    factor: float, most_s: float | None, retry: int, delay_s: float
) -> None:
    spec = TaskSpec("task", backoff_factor=factor, backoff_max_s=most_s)
    assert transitions.backoff_delay_s(spec, retry) == delay_s


def test_a_retry_has_a_fresh_schedule_timeout_and_goes_before_new_work() -> None:
    bench = RunHarness(TaskSpec("task", retries=1, schedule_timeout_s=10))
    lease = bench.grant()
    bench.pass_time(100)
    bench.fail(lease)
    assert bench.task().schedule_deadline == bench.now + 10
    assert bench.task().resumed


# --- losing a worker --------------------------------------------------------------------------------------------


def test_a_lost_worker_costs_no_retry_of_the_user() -> None:
    bench = RunHarness("task")
    bench.worker_lost(bench.grant())
    assert bench.status() == "READY"
    assert (bench.task().retries_used, bench.task().losses) == (0, 1)


def test_a_task_that_keeps_losing_its_workers_fails_in_the_end() -> None:
    bench = RunHarness("task", reply_to="me")
    for _ in range(limits.MAX_LOSSES):
        bench.worker_lost(bench.grant())
        assert bench.status() == "READY"
    bench.worker_lost(bench.grant())
    (result,) = bench.sent(RunResult, Inbox("me"))
    assert result.errors[0].type == "WorkerLost"


def test_losses_are_counted_from_the_last_new_checkpoint_on() -> None:
    bench = RunHarness(TaskSpec("task", durable=True))
    for _ in range(limits.MAX_LOSSES):
        bench.worker_lost(bench.grant())
    bench.evict(bench.grant(), wait_op("0", sleep(5)))
    assert bench.task().losses == 0


def test_a_declined_grant_counts_as_no_attempt() -> None:
    bench = RunHarness("task")
    bench.grant_declined(bench.grant())
    assert bench.status() == "READY"
    assert (bench.task().retry_count, bench.task().losses) == (0, 0)


# --- leases -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ENDS_OF_A_LEASE)
@pytest.mark.parametrize("late", ["finish", "fail", "lose", "hand back", "release", "extend", "evict", "record"])
def test_a_report_under_a_lease_that_has_ended_changes_nothing(end: str, late: str) -> None:
    bench = RunHarness(TaskSpec("task", retries=1))
    lease = bench.grant()
    after(bench, end)
    reports = {
        "finish": lambda: bench.finish(lease, "late"),
        "fail": lambda: bench.fail(lease),
        "lose": lambda: bench.worker_lost(lease),
        "hand back": lambda: bench.grant_declined(lease),
        "release": lambda: bench.release(lease),
        "extend": lambda: bench.extend(lease, 10, 1),
        "evict": lambda: bench.evict(lease),
        "record": lambda: bench.record(lease, number=1),
    }
    assert bench.changes_nothing(reports[late])


@pytest.mark.parametrize("end", ["retry", "lose", "hand back", "time out"])
def test_a_report_under_an_old_lease_does_not_touch_the_new_one(end: str) -> None:
    bench = RunHarness(TaskSpec("task", retries=1))
    old = bench.grant()
    after(bench, end)
    new = bench.grant(worker="worker-2")
    assert old != new
    assert bench.changes_nothing(lambda: bench.finish(old, "old"))
    bench.finish(new, "new")
    assert bench.task().output == '"new"'


@pytest.mark.parametrize(
    "lease", ["", "nonsense", f"{RUN_ID}.task", f"{RUN_ID}.task@", f"{RUN_ID}.task@x", "a@1", "@1"]
)
def test_a_lease_that_never_was_is_no_lease(lease: str) -> None:
    bench = RunHarness("task")
    bench.grant()
    assert bench.changes_nothing(lambda: bench.finish(lease))


def test_releasing_the_slot_keeps_the_lease_and_a_second_time_does_nothing() -> None:
    bench = RunHarness("task")
    lease = bench.grant()
    bench.release(lease)
    held = bench.held()
    assert (held.released, held.ticket) == (True, "")
    assert bench.changes_nothing(lambda: bench.release(lease))
    bench.finish(lease)
    assert bench.run.status == "COMPLETED"


def test_an_extension_counts_once_and_for_its_own_attempt_only() -> None:
    bench = RunHarness(TaskSpec("task", retries=1, execution_timeout_s=60))
    lease = bench.grant()
    bench.extend(lease, 30, number=1)
    assert bench.changes_nothing(lambda: bench.extend(lease, 30, number=1))
    assert bench.held().deadline == NOW + 90
    bench.fail(lease)
    bench.grant()
    assert bench.held().deadline == NOW + 60


# --- timeouts ---------------------------------------------------------------------------------------------------


def test_a_task_that_exceeds_its_timeout_fails_and_its_lease_is_revoked() -> None:
    bench = RunHarness(TaskSpec("task", execution_timeout_s=60))
    lease = bench.grant()
    bench.time_out()
    assert bench.sent(Revoked, Inbox(INBOX)) == [Revoked(lease, "timed_out")]
    assert bench.run.status == "FAILED"
    assert bench.error().message == "Task exceeded timeout of 60 s"


def test_a_timeout_uses_up_a_retry() -> None:
    bench = RunHarness(TaskSpec("task", retries=1))
    lease = bench.grant()
    bench.time_out()
    assert bench.status() == "READY"
    assert bench.task().retries_used == 1
    assert bench.changes_nothing(lambda: bench.finish(lease))


def test_a_task_that_found_no_slot_in_time_is_cancelled() -> None:
    bench = RunHarness("task", reply_to="me")
    bench.schedule_time_out()
    (result,) = bench.sent(RunResult, Inbox("me"))
    assert result.status == "CANCELLED"
    assert "schedule timeout" in (result.cancelled_reason or "")


# --- cancelling -------------------------------------------------------------------------------------------------


def test_cancelling_a_run_tells_the_workers_of_its_tasks_and_ends_the_rest() -> None:
    bench = RunHarness("a", "b", TaskSpec("c", parents=("a",)))
    lease = bench.grant("a")
    bench.cancel()
    assert bench.sent(Revoked) == [Revoked(lease, "cancelled")]
    assert set(bench.statuses().values()) == {"CANCELLED"}
    assert bench.run.status == "CANCELLED"


def test_a_task_that_waits_for_its_retry_is_cancelled_and_never_starts() -> None:
    bench = RunHarness(TaskSpec("task", retries=1, backoff_factor=3))
    bench.fail(bench.grant())
    (timer,) = bench.sent(SetTimer)
    bench.cancel()
    assert bench.sent(CancelTimer) == [CancelTimer(timer.id)]
    assert bench.changes_nothing(lambda: bench.fire(timer.operation_id, timer.key))


def test_cancelling_what_has_ended_changes_nothing() -> None:
    bench = RunHarness("a", TaskSpec("b", parents=("a",)))
    bench.run_task("a")
    assert bench.changes_nothing(lambda: bench.cancel_task("a"))
    bench.run_task("b")
    assert bench.changes_nothing(bench.cancel)
    assert bench.run.status == "COMPLETED"


def test_cancelling_one_task_cancels_what_comes_after_it() -> None:
    bench = RunHarness("a", "b", TaskSpec("c", parents=("a",)))
    bench.cancel_task("a")
    assert bench.statuses() == {"a": "CANCELLED", "b": "READY", "c": "CANCELLED"}


def test_tasks_that_completed_before_the_run_was_cancelled_keep_their_outputs() -> None:
    bench = RunHarness("a", TaskSpec("b", parents=("a",)), reply_to="me")
    bench.run_task("a", 1)
    bench.cancel()
    (result,) = bench.sent(RunResult, Inbox("me"))
    assert result.status == "CANCELLED"
    assert list(result.outputs) == ["a"]


# --- replay -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", ["ready", "running", "backing off", "pending"])
def test_a_run_that_has_not_finished_cannot_be_replayed(state: str) -> None:
    waits = both(event()) if state == "pending" else ()
    bench = RunHarness(TaskSpec("task", retries=1, backoff_factor=2, wait_for=waits))
    if state in ("running", "backing off"):
        lease = bench.grant()
        if state == "backing off":
            bench.fail(lease)
    with pytest.raises(ValueError, match="only a finished run can be replayed"):
        bench.replay()


def test_a_run_that_never_started_cannot_be_replayed() -> None:
    run = transitions.create(RunRequest(RUN_ID, "ghost"), None, Effects(NOW))
    with pytest.raises(ValueError, match="request a new run"):
        transitions.replay(run, workflow("task", name="ghost"), Effects(NOW))


def test_a_replay_runs_what_failed_and_all_after_it_and_keeps_the_rest() -> None:
    bench = RunHarness("a", "b", TaskSpec("c", parents=("a", "b")))
    bench.run_task("a", {"n": 1})
    bench.fail(bench.grant("b"))
    bench.replay()
    assert bench.statuses() == {"a": "COMPLETED", "b": "READY", "c": "PENDING"}
    bench.run_task("b")
    bench.grant("c")
    assert bytes(bench.grant_message("c").parents["a"]) == b'{"n":1}'


def test_a_replay_of_a_completed_run_runs_all_of_it() -> None:
    bench = RunHarness("a", TaskSpec("b", parents=("a",)))
    bench.run_task("a")
    bench.run_task("b")
    bench.replay()
    assert bench.statuses() == {"a": "READY", "b": "PENDING"}
    assert bench.run.status == "QUEUED"


def test_a_replay_decides_again_what_had_been_cancelled_or_skipped_before_it_began() -> None:
    bench = RunHarness("a", TaskSpec("b", skip_if=both(parent("a", "output.skip"))))
    bench.fail(bench.grant("a"))
    assert bench.status("b") == "CANCELLED"
    bench.replay()
    bench.run_task("a", {"skip": True})
    assert bench.status("b") == "SKIPPED"
    assert bench.run.status == "COMPLETED"


def test_a_sleep_before_a_task_counts_anew_after_a_replay_and_the_timer_of_before_is_nothing_to_it() -> None:
    bench = RunHarness(TaskSpec("task", wait_for=both(sleep())))
    (before,) = bench.sent(SetTimer)
    bench.cancel()
    bench.replay()
    late = TimerFired(before.task_run_id, before.operation_id, before.key)
    assert transitions.timer_fired(bench.run, late, bench.workflow, Effects(NOW)) is bench.run
    bench.fire()
    assert bench.status() == "READY"


def test_a_replay_resets_the_attempts_and_needs_a_new_lease() -> None:
    bench = RunHarness(TaskSpec("task", retries=1))
    bench.fail(bench.grant())
    old = bench.grant()
    bench.fail(old)
    bench.replay()
    assert bench.changes_nothing(lambda: bench.finish(old))
    bench.fail(bench.grant())
    assert bench.status() == "READY"


# --- who is told ------------------------------------------------------------------------------------------------


def test_a_request_for_a_finished_run_is_answered_at_once() -> None:
    bench = RunHarness("task")
    bench.run_task("task")
    bench.watch("late")
    assert [result.status for result in bench.sent(RunResult, Inbox("late"))] == ["COMPLETED"]


def test_a_second_request_for_a_run_adds_its_watcher_and_starts_nothing() -> None:
    bench = RunHarness("task", reply_to="first")
    bench.add_interest(reply_to="second")
    assert bench.changes_nothing(lambda: bench.add_interest(reply_to="second"))
    bench.run_task("task")
    assert [m.to for m in bench.messages if isinstance(record_of(m), RunResult)][:2] == [
        Inbox("first"),
        Inbox("second"),
    ]


def test_a_waiting_parent_gets_the_result_of_its_child() -> None:
    bench = RunHarness("task", parent=PARENT)
    bench.run_task("task", {"n": 1})
    (told,) = bench.sent(ChildFinished)
    assert (told.task_run_id, told.operation_id, told.child_run_id) == (PARENT.task_run_id, PARENT.operation_id, RUN_ID)
    assert bytes(told.output) == b'{"n":1}'


def test_a_parent_that_does_not_wait_gets_no_result() -> None:
    bench = RunHarness("task", parent=PARENT, notify_parent=False)
    bench.run_task("task")
    assert not bench.sent(ChildFinished)


def test_a_parent_that_requests_a_finished_child_gets_its_result_at_once() -> None:
    bench = RunHarness("task")
    bench.run_task("task")
    bench.add_interest(parent=PARENT)
    assert len(bench.sent(ChildFinished)) == 1


def test_a_parent_gets_the_outputs_of_a_child_with_several_tasks_by_name() -> None:
    bench = RunHarness("a", TaskSpec("b", parents=("a",), skip_if=both(parent("a"))), parent=PARENT)
    bench.run_task("a", 1)
    (told,) = bench.sent(ChildFinished)
    assert msgspec.json.decode(told.output) == {"a": 1, "b": {"skipped": True}}


@pytest.mark.parametrize(("how", "kind"), [("fail", "ValueError"), ("cancel", "ChildCancelled")])
def test_a_parent_gets_the_error_of_a_child_that_failed_or_was_cancelled(how: str, kind: str) -> None:
    bench = RunHarness("task", parent=PARENT)
    bench.grant()
    after(bench, how)
    (told,) = bench.sent(ChildFinished)
    assert told.error is not None
    assert told.error.type == kind


def test_the_result_is_sent_once_when_every_task_has_ended() -> None:
    bench = RunHarness("a", "b", reply_to="me")
    bench.run_task("a")
    assert not bench.sent(RunResult)
    bench.run_task("b")
    assert len(bench.sent(RunResult, Inbox("me"))) == 1


def test_results_and_children_s_ends_survive_a_crash_but_notices_need_not() -> None:
    bench = RunHarness("task", reply_to="me", parent=PARENT)
    bench.fail(bench.grant())
    durable = {type(record_of(m)).__name__: m.durable for m in bench.messages if not isinstance(m.to, Notice)}
    assert durable == {"RunResult": True, "ChildFinished": True}
    notices = [message for message in bench.messages if isinstance(message.to, Notice)]
    assert {message.to for message in notices} == {Notice("task.failed.flow.task"), Notice("run.failed.flow")}
    assert not any(e.durable for e in notices)


def test_a_task_that_fails_is_announced() -> None:
    bench = RunHarness("task")
    bench.fail(bench.grant())
    (notice,) = bench.sent(TaskNotice)
    assert (notice.task, notice.status) == ("task", "FAILED")


def test_a_run_knows_its_tasks_by_name() -> None:
    run: Run = RunHarness("task").run
    with pytest.raises(KeyError, match="no task 'ghost'"):
        run.task("ghost")
