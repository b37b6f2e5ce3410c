"""Durable tasks: checkpoints, what opens and closes a wait, and when code that has left may go on."""

from __future__ import annotations

import itertools
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sublet_engine.run import completion, durable_log, transitions
from sublet_engine.run.effects import Effects, position_at
from sublet_engine.run.state import OpenWait
from sublet_protocol import limits
from sublet_protocol.destinations import Inbox
from sublet_protocol.ids import child_run_id
from sublet_protocol.messages import (
    CancelTimer,
    EventMatched,
    OperationCompleted,
    ParentLink,
    RunRequest,
    SetTimer,
    Subscribe,
    TaskNotice,
    Unsubscribe,
)
from sublet_protocol.specs import TaskSpec
from support.engine_builders import (
    INBOX,
    NOW,
    RunHarness,
    both,
    either,
    error,
    event,
    memo_op,
    raw,
    run_op,
    sleep,
    wait_op,
)

DURABLE = TaskSpec("task", durable=True, retries=1)


def sleeping(duration_s: float = 5.0) -> RunHarness:
    """A task that has left its worker, and sleeps at node 0."""
    bench = RunHarness(DURABLE)
    bench.evict(bench.grant(), wait_op("0", sleep(duration_s)))
    return bench


# --- checkpoints ------------------------------------------------------------------------------------------------


def test_a_task_that_waits_holds_no_lease_and_no_slot() -> None:
    bench = sleeping()
    assert bench.status() == "EVICTED"
    assert bench.task().lease is None
    assert [timer.due for timer in bench.sent(SetTimer)] == [NOW + 5]
    assert [notice.status for notice in bench.sent(TaskNotice)] == ["EVICTED"]


def test_the_end_of_its_wait_makes_it_ready_without_a_schedule_timeout() -> None:
    bench = sleeping()
    bench.fire("0")
    task = bench.task()
    assert (task.status, task.resumed, task.schedule_deadline) == ("READY", True, None)


def test_it_goes_on_under_a_new_lease_with_its_log() -> None:
    bench = sleeping()
    bench.fire("0")
    bench.grant()
    assert bench.task().invocation == 2
    done = bench.entries()["0"].done
    assert done is not None
    assert msgspec.json.decode(done.result) == {"CREATE": {"sleep": [{"duration_s": 5.0}]}}


def test_a_wait_that_ended_before_the_checkpoint_arrived_makes_the_task_ready_at_once() -> None:
    bench = RunHarness(DURABLE)
    lease = bench.grant()
    bench.record(lease, wait_op("0", event()), number=1, waiting=True)
    bench.match("0")
    bench.evict(lease, blocked=[("0",)])
    assert bench.status() == "READY"


def test_a_sleep_of_zero_length_is_completed_at_once() -> None:
    bench = sleeping(0)
    assert bench.status() == "READY"
    assert not bench.sent(SetTimer)
    assert bench.task().completed_count == 1


def test_a_checkpoint_that_comes_twice_changes_nothing() -> None:
    bench = RunHarness(DURABLE)
    lease = bench.grant()
    bench.evict(lease, wait_op("0", sleep()))
    assert bench.changes_nothing(lambda: bench.evict(lease, wait_op("0", sleep())))


def test_several_waits_that_end_before_the_claim_are_one_resume() -> None:
    bench = RunHarness(DURABLE)
    bench.evict(bench.grant(), wait_op("0", sleep()), wait_op("1", event()))
    bench.fire("0")
    ready = bench.task()
    bench.match("1")
    assert bench.task().ready_at == ready.ready_at
    bench.grant()
    assert bench.task().invocation == 2
    assert [entry.done.order for entry in bench.entries().values() if entry.done] == [1, 2]


def test_two_equal_sleeps_are_two_sleeps() -> None:
    bench = RunHarness(DURABLE)
    bench.evict(bench.grant(), wait_op("0", sleep()), wait_op("1", sleep()), blocked=[("0", "1")])
    assert len({timer.id for timer in bench.sent(SetTimer)}) == 2
    bench.fire("0")
    assert bench.status() == "EVICTED"
    bench.fire("1")
    assert bench.status() == "READY"


def test_a_task_that_left_although_nothing_is_known_to_hold_it_is_ready_at_once() -> None:
    bench = RunHarness(DURABLE)
    bench.evict(bench.grant(), blocked=[])
    assert bench.status() == "READY"


# --- when a branch may go on ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("blocked", "open_nodes", "goes_on"),
    [
        ([("0",)], ["0"], False),
        ([("0",)], [], True),
        ([("0", "1")], ["1"], False),
        ([("0", "1")], [], True),
        ([("0",), ("1",)], ["1"], True),
        ([("0",), ("1",)], ["0", "1"], False),
        ([("0", "1"), ("2",)], ["1", "2"], False),
        ([("0", "1"), ("2",)], ["1"], True),
        ([], ["0"], True),
    ],
)
def test_code_goes_on_when_one_branch_has_all_that_it_waits_for(
    blocked: list[tuple[str, ...]], open_nodes: list[str], goes_on: bool
) -> None:
    task = msgspec.structs.replace(
        RunHarness(DURABLE).task(),
        status="EVICTED",
        blocked=tuple(blocked),
        open_waits=tuple(OpenWait(operation_id, child_run_id="child") for operation_id in open_nodes),
    )
    assert durable_log.can_resume(task) is goes_on


def test_a_wait_that_no_branch_waits_for_any_more_wakes_nobody() -> None:
    bench = RunHarness(DURABLE)
    bench.evict(bench.grant(), wait_op("0", event("given up")), wait_op("1", sleep()), blocked=[("1",)])
    bench.match("0", "given up")
    assert bench.status() == "EVICTED"
    bench.fire("1")
    assert bench.status() == "READY"


@settings(max_examples=150, deadline=None)
@given(
    branches=st.lists(st.integers(1, 3), min_size=1, max_size=4),
    data=st.data(),
)
def test_it_sleeps_exactly_as_long_as_every_branch_still_waits(branches: list[int], data: st.DataObject) -> None:
    operation_ids = [[f"t{b}.{n}" for n in range(count)] for b, count in enumerate(branches)]
    every = [operation_id for branch in operation_ids for operation_id in branch]
    bench = RunHarness(DURABLE)
    bench.evict(
        bench.grant(),
        *(wait_op(operation_id, sleep()) for operation_id in every),
        blocked=[tuple(b) for b in operation_ids],
    )
    ended: list[str] = []
    for operation_id in data.draw(st.permutations(every)):
        bench.fire(operation_id)
        ended.append(operation_id)
        free = any(set(branch) <= set(ended) for branch in operation_ids)
        assert bench.status() == ("READY" if free else "EVICTED")
    orders = {operation_id: entry.done.order for operation_id, entry in bench.entries().items() if entry.done}
    assert sorted(orders, key=lambda operation_id: orders[operation_id]) == ended
    assert sorted(orders.values()) == list(range(1, len(every) + 1))


# --- what ends a wait -------------------------------------------------------------------------------------------


def test_a_wait_for_several_things_ends_with_the_last_of_them() -> None:
    bench = RunHarness(DURABLE)
    bench.evict(bench.grant(), wait_op("0", both(sleep(), event())))
    bench.match("0")
    assert bench.status() == "EVICTED"
    bench.fire("0")
    assert bench.status() == "READY"
    done = bench.entries()["0"].done
    assert done is not None
    assert set(msgspec.json.decode(done.result)["CREATE"]) == {"sleep", "paid"}


def test_a_wait_for_one_of_several_things_ends_with_the_first_and_withdraws_the_rest() -> None:
    bench = RunHarness(DURABLE)
    bench.evict(bench.grant(), wait_op("0", either(sleep(), event("a"), event("b"))))
    bench.match("0", "a")
    assert bench.status() == "READY"
    assert [timer.id for timer in bench.sent(CancelTimer)] == [f"{bench.task_run()}#0#sleep"]
    assert [wait.id for wait in bench.sent(Unsubscribe)] == [f"{bench.task_run()}#0#b"]
    done = bench.entries()["0"].done
    assert done is not None
    assert msgspec.json.decode(done.result) == {"CREATE": {"a": [{"seq": 1}]}}


@settings(max_examples=150, deadline=None)
@given(sizes=st.lists(st.integers(1, 3), min_size=1, max_size=3), data=st.data())
def test_a_wait_ends_when_each_of_its_groups_has_something_true(sizes: list[int], data: st.DataObject) -> None:
    names = itertools.count()
    groups = tuple(tuple(event(f"e{next(names)}") for _ in range(size)) for size in sizes)
    keys = [condition.key for group in groups for condition in group]
    bench = RunHarness(DURABLE)
    bench.evict(bench.grant(), wait_op("0", groups))
    true: set[str] = set()
    for seq, key in enumerate(data.draw(st.lists(st.sampled_from([*keys, "foreign"]), max_size=12)), start=1):
        over_before = bench.status() == "READY"
        bench.match("0", key, seq=seq)
        if not over_before:
            true.add(key)
        over = all(true.intersection(c.key for c in group) for group in groups)
        assert bench.status() == ("READY" if over else "EVICTED")
    if bench.status() == "READY":
        done = bench.entries()["0"].done
        assert done is not None
        assert set(msgspec.json.decode(done.result)["CREATE"]) == true.intersection(keys)


@pytest.mark.parametrize("again", ["same condition", "other condition", "unknown node"])
def test_a_condition_of_a_closed_wait_changes_nothing(again: str) -> None:
    bench = RunHarness(DURABLE)
    bench.evict(bench.grant(), wait_op("0", either(event("a"), event("b"))), wait_op("1", sleep()))
    bench.match("0", "a")
    operation_id, key = {"same condition": ("0", "a"), "other condition": ("0", "b"), "unknown node": ("9", "a")}[again]
    assert bench.changes_nothing(lambda: bench.match(operation_id, key))


def test_the_first_of_two_equal_events_counts() -> None:
    bench = RunHarness(DURABLE)
    bench.evict(bench.grant(), wait_op("0", both(event("a"), event("b"))))
    bench.match("0", "a", seq=1, payload={"n": 1})
    bench.match("0", "a", seq=2, payload={"n": 2})
    bench.match("0", "b", seq=3)
    done = bench.entries()["0"].done
    assert done is not None
    assert msgspec.json.decode(done.result)["CREATE"]["a"] == [{"n": 1}]


# --- children ---------------------------------------------------------------------------------------------------


def waiting_for_child(**child: Any) -> tuple[RunHarness, str]:
    bench = RunHarness(DURABLE, metadata={"tenant": "a", "kind": "parent"}, priority=3)
    bench.evict(bench.grant(), run_op("0", **child))
    wait = bench.open_wait("0")
    assert wait.child_run_id is not None
    return bench, wait.child_run_id


def test_a_child_is_requested_once_under_a_derived_id_with_its_parent_s_metadata_and_priority() -> None:
    bench, child = waiting_for_child(metadata={"kind": "child"}, input=raw({"n": 1}))
    (request,) = bench.sent(RunRequest)
    assert request.run_id == child == child_run_id(bench.task_run(), operation_id="0")
    assert request.parent == ParentLink(bench.task_run(), "0")
    assert request.metadata == {"tenant": "a", "kind": "child"}
    assert request.priority == 3


def test_two_operations_with_one_child_key_share_one_child_and_both_get_its_result() -> None:
    bench = RunHarness(DURABLE)
    bench.evict(bench.grant(), run_op("0", child_key="k"), run_op("1", child_key="k"), blocked=[("0", "1")])
    first, second = bench.sent(RunRequest)
    assert first.run_id == second.run_id
    bench.child_ended("0", first.run_id, output=7)
    bench.child_ended("1", first.run_id, output=7)
    assert bench.status() == "READY"


def test_every_replay_gets_the_error_of_a_failed_child() -> None:
    bench, child = waiting_for_child()
    bench.child_ended("0", child, failed=error("KeyError", "gone"))
    bench.fail(bench.grant())
    bench.grant()
    done = bench.entries()["0"].done
    assert done is not None
    assert done.error == error("KeyError", "gone")


@pytest.mark.parametrize("wrong", ["another child", "another node", "twice"])
def test_the_end_of_a_child_that_nobody_waits_for_changes_nothing(wrong: str) -> None:
    bench, child = waiting_for_child()
    if wrong == "twice":
        bench.child_ended("0", child)
    operation_id, run_id = {"another child": ("0", "other"), "another node": ("1", child), "twice": ("0", child)}[wrong]
    assert bench.changes_nothing(lambda: bench.child_ended(operation_id, run_id))


def test_the_children_of_a_cancelled_task_go_on_and_their_ends_are_ignored() -> None:
    bench, child = waiting_for_child()
    bench.cancel()
    assert bench.run.status == "CANCELLED"
    assert bench.changes_nothing(lambda: bench.child_ended("0", child))


# --- staying resident -------------------------------------------------------------------------------------------


def test_a_resident_task_receives_the_completions_of_its_waits_in_order() -> None:
    bench = RunHarness(DURABLE)
    lease = bench.grant()
    bench.record(lease, wait_op("0", sleep()), wait_op("1", event()), number=1, waiting=True)
    bench.match("1")
    (completed_count,) = bench.sent(OperationCompleted, Inbox(INBOX))
    assert (completed_count.lease, completed_count.operation_id, completed_count.done.order) == (lease, "1", 1)
    bench.fire("0")
    assert bench.sent(OperationCompleted)[0].done.order == 2


def test_a_record_that_comes_twice_counts_once() -> None:
    bench = RunHarness(DURABLE)
    lease = bench.grant()
    bench.record(lease, memo_op("0"), number=1)
    assert bench.changes_nothing(lambda: bench.record(lease, memo_op("0"), number=1))
    bench.record(lease, memo_op("1"), number=2)
    assert bench.changes_nothing(lambda: bench.record(lease, memo_op("0"), number=1))
    assert list(bench.entries()) == ["0", "1"]


def test_reports_are_counted_anew_under_each_lease() -> None:
    bench = RunHarness(DURABLE)
    bench.record(bench.grant(), memo_op("0"), number=1)
    bench.worker_lost(bench.lease())
    bench.record(bench.grant(), memo_op("1"), number=1)
    assert list(bench.entries()) == ["0", "1"]


def test_nothing_that_an_old_invocation_says_reaches_the_log() -> None:
    bench = RunHarness(DURABLE)
    old = bench.grant()
    bench.worker_lost(old)
    bench.grant(worker="worker-2")
    assert bench.changes_nothing(lambda: bench.record(old, memo_op("0", "old"), number=1))
    assert bench.changes_nothing(lambda: bench.evict(old, wait_op("0", sleep())))


def test_a_result_that_comes_between_attempts_is_found_in_the_log_by_the_next() -> None:
    bench = RunHarness(DURABLE)
    lease = bench.grant()
    bench.record(lease, wait_op("0", event()), number=1)
    bench.fail(lease)
    bench.match("0")
    assert not bench.sent(OperationCompleted)
    bench.grant()
    assert bench.entries()["0"].done is not None


# --- time -------------------------------------------------------------------------------------------------------


def test_only_active_time_counts_towards_the_execution_timeout() -> None:
    bench = RunHarness(TaskSpec("task", durable=True, execution_timeout_s=60))
    bench.evict(bench.grant(), wait_op("0", sleep(1_000)), active_s=10)
    bench.pass_time(1_000)
    bench.fire("0")
    bench.grant()
    assert bench.held().deadline == bench.now + 50


def test_the_clock_of_a_resident_task_stands_while_it_waits() -> None:
    bench = RunHarness(TaskSpec("task", durable=True, execution_timeout_s=60))
    lease = bench.grant()
    bench.pass_time(10)
    bench.record(lease, wait_op("0", event()), number=1, waiting=True)
    assert bench.held().deadline is None
    bench.pass_time(1_000)
    bench.match("0")
    assert bench.held().deadline == bench.now + 50


def test_the_execution_clock_does_not_stop_for_a_wait_that_completes_at_once() -> None:
    bench = RunHarness(TaskSpec("task", durable=True, execution_timeout_s=60))
    bench.record(bench.grant(), wait_op("0", sleep(0)), number=1, waiting=True)
    assert bench.held().deadline == NOW + 60


def test_the_clock_goes_on_when_the_code_says_so() -> None:
    bench = RunHarness(TaskSpec("task", durable=True, execution_timeout_s=60))
    lease = bench.grant()
    bench.record(lease, wait_op("0", event()), number=1, waiting=True)
    bench.pass_time(100)
    bench.record(lease, number=2, waiting=False)
    assert bench.held().deadline == bench.now + 60


@pytest.mark.parametrize("how", ["lose", "hand back"])
def test_a_task_with_a_log_never_misses_a_schedule_timeout_after_it_lost_its_worker(how: str) -> None:
    bench = sleeping()
    bench.fire("0")
    lease = bench.grant()
    bench.worker_lost(lease) if how == "lose" else bench.grant_declined(lease)
    assert bench.task().schedule_deadline is None


# --- where event waits listen from ------------------------------------------------------------------------------


def ended_at(bench: RunHarness, operation_id: str) -> int:
    done = bench.entries()[operation_id].done
    assert done is not None
    return done.position


def test_the_first_wait_listens_from_the_start_of_the_run() -> None:
    bench = RunHarness(DURABLE)
    bench.pass_time(10)
    bench.grant()
    assert bench.grant_message().position == position_at(NOW)


def test_a_wait_listens_from_where_its_operation_says_or_from_further_back() -> None:
    bench = RunHarness(DURABLE)
    far_back = event("b", since_s=NOW - 60)
    too_late = event("c", since_s=NOW + 60)
    bench.evict(bench.grant(), wait_op("0", both(event("a"), far_back, too_late), since=position_at(NOW)))
    assert [wait.since for wait in bench.sent(Subscribe)] == [
        position_at(NOW),
        position_at(NOW - 60),
        position_at(NOW),
    ]


def test_after_an_event_the_next_wait_listens_from_that_event() -> None:
    bench = RunHarness(DURABLE)
    bench.evict(bench.grant(), wait_op("0", event(), since=100))
    bench.match("0", seq=150)
    assert ended_at(bench, "0") == 150


def test_after_several_events_the_next_wait_listens_from_the_last_one_in_any_order_of_arrival() -> None:
    bench = RunHarness(DURABLE)
    bench.evict(bench.grant(), wait_op("0", both(event("a"), event("b")), since=100))
    bench.match("0", "b", seq=200)
    bench.match("0", "a", seq=150)
    assert ended_at(bench, "0") == 200


def test_after_a_sleep_the_next_wait_listens_from_its_end_however_late_that_is_heard_of() -> None:
    bench = RunHarness(DURABLE)
    bench.evict(bench.grant(), wait_op("0", sleep(5)))
    bench.pass_time(7)
    bench.fire("0")
    assert ended_at(bench, "0") == position_at(NOW + 5)


@pytest.mark.parametrize(("told", "expected"), [(None, NOW + 7), (NOW + 6, NOW + 6), (NOW + 99, NOW + 7)])
def test_after_a_child_the_next_wait_listens_from_its_end(told: float | None, expected: float) -> None:
    bench = RunHarness(DURABLE)
    bench.evict(bench.grant(), run_op("0"))
    bench.pass_time(7)
    bench.child_ended("0", bench.open_wait("0").child_run_id or "", at=told)
    assert ended_at(bench, "0") == position_at(expected)


def test_an_event_on_its_way_while_a_sleep_ended_the_wait_for_it_is_not_lost_to_the_next_wait() -> None:
    bench = RunHarness(DURABLE)
    bench.evict(bench.grant(), wait_op("0", either(sleep(5), event()), since=100))
    bench.pass_time(5)
    bench.fire("0")
    assert ended_at(bench, "0") == 100


def test_an_event_that_was_used_is_not_seen_again_although_a_sleep_ended_the_wait() -> None:
    bench = RunHarness(DURABLE)
    bench.evict(bench.grant(), wait_op("0", (*both(event("a")), *either(sleep(5), event("b"))), since=100))
    bench.match("0", "a", seq=150)
    bench.fire("0")
    assert ended_at(bench, "0") == 150


# --- the end ----------------------------------------------------------------------------------------------------


def ending(bench: RunHarness, how: str) -> None:
    if how == "cancel":
        bench.cancel()
        return
    lease = bench.grant()
    bench.finish(lease) if how == "finish" else bench.fail(lease, retryable=False)


@pytest.mark.parametrize("how", ["finish", "fail", "cancel"])
def test_a_task_that_ends_with_open_waits_withdraws_them_and_nothing_wakes_it(how: str) -> None:
    bench = RunHarness(DURABLE)
    bench.evict(
        bench.grant(), wait_op("0", sleep()), wait_op("1", both(event("a"), event("b"))), wait_op("2", sleep(0))
    )
    bench.match("1", "a")
    ending(bench, how)
    assert [timer.id for timer in bench.sent(CancelTimer)] == [f"{bench.task_run()}#0#sleep"]
    assert [wait.id for wait in bench.sent(Unsubscribe)] == [f"{bench.task_run()}#1#b"]
    assert bench.changes_nothing(lambda: bench.fire("0"))
    assert bench.changes_nothing(lambda: bench.match("1", "b"))


def test_a_result_that_crosses_with_nothing_is_taken_even_though_waits_are_open() -> None:
    bench = RunHarness(DURABLE)
    lease = bench.grant()
    bench.record(lease, wait_op("0", sleep()), number=1)
    bench.finish(lease, "done")
    assert bench.run.status == "COMPLETED"


def test_a_retry_keeps_the_log_and_does_not_ask_again() -> None:
    bench = sleeping()
    bench.fire("0")
    bench.fail(bench.grant())
    bench.grant()
    assert bench.entries()["0"].done is not None
    assert bench.task().retry_count == 1


# --- replay -----------------------------------------------------------------------------------------------------


def test_a_replayed_sleep_keeps_its_deadline() -> None:
    bench = sleeping(100)
    bench.pass_time(30)
    bench.cancel()
    bench.pass_time(30)
    bench.replay()
    assert [timer.due for timer in bench.sent(SetTimer)] == [NOW + 100]


def test_a_replay_of_an_event_wait_listens_from_where_it_did() -> None:
    bench = RunHarness(DURABLE)
    bench.evict(bench.grant(), wait_op("0", event(since_s=NOW - 60), since=position_at(NOW)))
    bench.cancel()
    bench.pass_time(30)
    bench.replay()
    assert [wait.since for wait in bench.sent(Subscribe)] == [position_at(NOW - 60)]


def test_a_replay_arms_only_what_is_still_missing() -> None:
    bench = RunHarness(DURABLE)
    bench.evict(bench.grant(), wait_op("0", both(event("a"), event("b"), sleep())))
    bench.match("0", "a")
    bench.fire("0")
    bench.cancel()
    bench.replay()
    assert [wait.condition.key for wait in bench.sent(Subscribe)] == ["b"]
    assert not bench.sent(SetTimer)


def test_a_replay_asks_under_ids_that_no_late_message_withdraws() -> None:
    bench = RunHarness(DURABLE)
    bench.evict(bench.grant(), wait_op("0", both(event(), sleep())))
    bench.cancel()
    (unsubscribe,), (cancel,) = bench.sent(Unsubscribe), bench.sent(CancelTimer)
    bench.replay()
    (subscribe,), (timer,) = bench.sent(Subscribe), bench.sent(SetTimer)
    assert subscribe.id != unsubscribe.id
    assert timer.id != cancel.id


def test_an_event_that_matched_before_a_replay_does_not_count_after_it() -> None:
    bench = RunHarness(DURABLE)
    bench.evict(bench.grant(), wait_op("0", event()))
    (before,) = bench.sent(Subscribe)
    bench.cancel()
    bench.replay()
    late = EventMatched(before.task_run_id, before.operation_id, "paid", "event-1", 1, raw({}))
    assert transitions.event_matched(bench.run, late, bench.workflow, Effects(NOW)) is bench.run


def test_a_replay_asks_for_the_end_of_a_child_that_ended_meanwhile_and_starts_no_other() -> None:
    bench, child = waiting_for_child()
    bench.cancel()
    bench.child_ended("0", child)
    bench.replay()
    (request,) = bench.sent(RunRequest)
    assert request.run_id == child
    assert request.parent == ParentLink(bench.task_run(), "0")


def test_a_replay_of_a_completed_task_finds_all_its_results() -> None:
    bench = sleeping()
    bench.fire("0")
    bench.finish(bench.grant())
    bench.replay()
    bench.grant()
    assert bench.entries()["0"].done is not None


# --- limits -----------------------------------------------------------------------------------------------------

MEGABYTE = "x" * 1_000_000


def nearly_full() -> RunHarness:
    """A task that waits for an event, a child and a sleep; its log has room for small results only."""
    bench = RunHarness(DURABLE)
    lease = bench.grant()
    waits = (wait_op("event", event()), run_op("child"), wait_op("sleep", sleep()))
    bench.evict(lease, *waits, *(memo_op(f"m{n}", MEGABYTE) for n in range(8)))
    return bench


@pytest.mark.parametrize("how", ["event", "child", "resident event"])
def test_a_result_that_does_not_fit_into_the_log_fails_its_task_and_nothing_else(how: str) -> None:
    bench = nearly_full()
    if how == "resident event":
        bench.fire("sleep")
        bench.grant()
    if how == "child":
        bench.child_ended("child", bench.open_wait("child").child_run_id or "", output=MEGABYTE)
    else:
        bench.match("event", payload={"text": MEGABYTE})
    assert bench.status() == "FAILED"
    assert bench.error().type == "LogFull"
    assert not bench.log


@pytest.mark.parametrize("how", ["evict", "record"])
def test_an_operation_beyond_the_limits_fails_the_task_without_a_retry(how: str) -> None:
    bench = nearly_full()
    bench.fire("sleep")
    lease = bench.grant()
    if how == "evict":
        bench.evict(lease, wait_op("before", sleep()), memo_op("too much", MEGABYTE))
    else:
        bench.record(lease, wait_op("before", sleep()), memo_op("too much", MEGABYTE), number=1)
    assert bench.status() == "FAILED"
    assert str(limits.LOG_MAX_BYTES) in bench.error().message
    assert not bench.log
    assert not bench.sent(SetTimer)


def test_a_log_has_a_greatest_length(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "LOG_MAX_ENTRIES", 3)
    bench = RunHarness(DURABLE)
    bench.evict(bench.grant(), *(wait_op(str(n), sleep()) for n in range(3)))
    assert bench.status() == "EVICTED"
    bench.fire("0")
    assert bench.status() == "FAILED"
    assert "the limit is 3" in bench.error().message


def test_the_bytes_of_a_log_are_those_of_utf_8() -> None:
    bench = RunHarness(DURABLE)
    text = "漢字" * 100
    bench.evict(bench.grant(), memo_op("memo", text), wait_op("0", sleep()))
    assert bench.task().log_bytes == len(msgspec.json.encode(text)) == 602


def test_a_log_of_chinese_text_is_full_at_the_same_number_of_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "LOG_MAX_BYTES", 601)
    bench = RunHarness(DURABLE)
    bench.evict(bench.grant(), memo_op("memo", "漢字" * 100), wait_op("0", sleep()))
    assert bench.error().type == "LogFull"
    assert "602 bytes" in bench.error().message


def test_a_sleep_in_a_dag_is_not_a_wait_in_the_log() -> None:
    bench = RunHarness(TaskSpec("task", durable=True, wait_for=both(sleep())))
    assert bench.status() == "PENDING"
    bench.fire(completion.DAG_WAIT)
    assert bench.status() == "READY"
    assert bench.task().log_length == 0
