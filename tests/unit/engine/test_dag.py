"""DAGs: when a task may run, and that every combination of parents and conditions comes to an end."""

from __future__ import annotations

import itertools
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sublet_engine.run import dag
from sublet_engine.run.completion import DAG_WAIT
from sublet_engine.run.state import TaskRun
from sublet_protocol.destinations import Inbox
from sublet_protocol.messages import CancelTimer, RunResult, SetTimer, Subscribe, Unsubscribe
from sublet_protocol.specs import (
    Condition,
    EventCondition,
    ParentCondition,
    SleepCondition,
    TaskSpec,
    WorkflowSpec,
    topological,
)
from support.engine_builders import NOW, RunHarness, both, either, event, parent, record_of, sleep, workflow

# --- parents ----------------------------------------------------------------------------------------------------


def test_a_task_without_parents_is_ready_at_once() -> None:
    assert RunHarness("task").status() == "READY"


def test_a_task_waits_for_all_its_parents() -> None:
    bench = RunHarness("a", "b", TaskSpec("c", parents=("a", "b")))
    bench.run_task("a")
    assert bench.status("c") == "PENDING"
    bench.run_task("b")
    assert bench.status("c") == "READY"


def test_two_parents_that_end_at_the_same_moment_make_the_child_ready_once() -> None:
    bench = RunHarness("a", "b", TaskSpec("c", parents=("a", "b")))
    first, second = bench.grant("a"), bench.grant("b")
    bench.finish(first)
    bench.finish(second)
    ready = bench.task("c")
    assert bench.changes_nothing(lambda: bench.finish(second))
    assert bench.task("c") == ready


def test_a_failed_parent_cancels_the_child_without_waiting_for_the_other_parents() -> None:
    bench = RunHarness("a", "b", TaskSpec("c", parents=("a", "b")), TaskSpec("d", parents=("c",)))
    bench.fail(bench.grant("a"))
    assert bench.statuses() == {"a": "FAILED", "b": "READY", "c": "CANCELLED", "d": "CANCELLED"}
    assert not bench.run.terminal


def test_branches_that_do_not_depend_on_a_failure_go_on_and_the_run_fails_when_all_is_done() -> None:
    bench = RunHarness("a", "b", TaskSpec("after b", parents=("b",)))
    bench.fail(bench.grant("a"))
    bench.run_task("b")
    bench.run_task("after b")
    assert bench.run.status == "FAILED"
    assert bench.status("after b") == "COMPLETED"


def test_a_failure_that_is_retried_does_not_reach_the_children() -> None:
    bench = RunHarness(TaskSpec("a", retries=1), TaskSpec("b", parents=("a",)))
    bench.fail(bench.grant("a"))
    assert bench.status("b") == "PENDING"


def skipped(name: str, **options: Any) -> TaskSpec:
    """A task that is always skipped, once its parent ``root`` is done."""
    return TaskSpec(name, parents=("root",), skip_if=both(parent("root")), **options)


def test_a_task_whose_parents_were_all_skipped_is_skipped() -> None:
    bench = RunHarness("root", skipped("a"), skipped("b"), TaskSpec("c", parents=("a", "b")))
    bench.run_task("root")
    assert bench.statuses() == {"root": "COMPLETED", "a": "SKIPPED", "b": "SKIPPED", "c": "SKIPPED"}
    assert bench.run.status == "COMPLETED"


def test_a_task_with_one_skipped_and_one_completed_parent_runs() -> None:
    bench = RunHarness("root", skipped("a"), TaskSpec("c", parents=("a", "root")))
    bench.run_task("root")
    assert bench.status("c") == "READY"


def test_a_task_with_one_skipped_and_one_failed_parent_is_cancelled() -> None:
    bench = RunHarness("root", "other", skipped("a"), TaskSpec("c", parents=("a", "other")))
    bench.run_task("root")
    bench.fail(bench.grant("other"))
    assert bench.status("c") == "CANCELLED"


def test_a_task_also_waits_for_tasks_that_only_its_conditions_look_at() -> None:
    bench = RunHarness("a", TaskSpec("b", skip_if=both(parent("a", "output.skip"))))
    assert bench.status("b") == "PENDING"
    bench.run_task("a", {"skip": False})
    assert bench.status("b") == "READY"


# --- conditions on parents --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("expression", "output", "true"),
    [
        (None, None, True),
        ("output.n > 3", {"n": 4}, True),
        ("output.n > 3", {"n": 3}, False),
        ("output.n > 3", {}, False),
        ("output.n > 3", None, False),
        ("output.n > 3", {"n": "text"}, False),
        ("output == 5", 5, True),
        ("output.n", {"n": 1}, False),
        ("output.n >", {"n": 1}, False),
        ("input.n == 1", {"n": 1}, False),
    ],
    ids=repr,
)
def test_a_parent_condition_is_true_only_if_its_expression_gives_true(
    expression: str | None, output: object, true: bool
) -> None:
    bench = RunHarness("a", TaskSpec("b", skip_if=both(parent("a", expression))))
    bench.run_task("a", output)
    assert bench.status("b") == ("SKIPPED" if true else "READY")


def test_an_output_too_deep_to_read_makes_no_condition_true() -> None:
    bench = RunHarness("a", TaskSpec("b", skip_if=both(parent("a", "output.n == 1"))))
    deep = msgspec.Raw(b"[" * 5_000 + b"]" * 5_000)
    bench.run_task("a", deep)
    assert bench.status("b") == "READY"


def test_a_false_parent_condition_in_wait_for_skips_the_task() -> None:
    bench = RunHarness("a", TaskSpec("b", wait_for=both(parent("a", "output.ok"))))
    bench.run_task("a", {"ok": False})
    assert bench.status("b") == "SKIPPED"
    assert bench.task("b").reason is not None


def test_a_false_parent_condition_beside_an_event_still_waits_for_the_event() -> None:
    bench = RunHarness("a", TaskSpec("b", wait_for=either(parent("a", "output.ok"), event())))
    bench.run_task("a", {"ok": False})
    assert bench.status("b") == "PENDING"
    bench.match(name="b")
    assert bench.status("b") == "READY"


def test_cancel_if_looks_at_the_output_of_a_completed_parent() -> None:
    bench = RunHarness("a", TaskSpec("b", cancel_if=both(parent("a", "output.stop"))))
    bench.run_task("a", {"stop": True})
    assert bench.status("b") == "CANCELLED"


def test_another_parent_that_fails_cancels_a_task_whose_cancel_if_is_not_true() -> None:
    bench = RunHarness("a", "b", TaskSpec("c", parents=("a", "b"), cancel_if=both(parent("a", "output.stop"))))
    bench.run_task("a", {"stop": False})
    bench.fail(bench.grant("b"))
    assert bench.status("c") == "CANCELLED"


def test_skip_if_on_one_of_two_parents_skips() -> None:
    bench = RunHarness("a", "b", TaskSpec("c", parents=("a", "b"), skip_if=both(parent("a", "output.skip"))))
    bench.run_task("a", {"skip": True})
    bench.run_task("b")
    assert bench.status("c") == "SKIPPED"


def test_cancel_if_goes_before_all_parents_skipped() -> None:
    bench = RunHarness("root", skipped("a"), TaskSpec("b", parents=("a",), cancel_if=both(parent("a"))))
    bench.run_task("root")
    assert bench.status("b") == "CANCELLED"


# --- sleeps and events ------------------------------------------------------------------------------------------


def test_a_sleep_begins_when_the_parents_are_done() -> None:
    bench = RunHarness("a", TaskSpec("b", parents=("a",), wait_for=both(sleep(5))))
    assert not bench.sent(SetTimer)
    bench.pass_time(100)
    bench.run_task("a")
    assert [timer.due for timer in bench.sent(SetTimer)] == [NOW + 105]
    bench.fire(name="b")
    assert bench.status("b") == "READY"


def test_an_event_counts_from_the_start_of_the_run() -> None:
    bench = RunHarness("a", TaskSpec("b", parents=("a",), wait_for=both(event())))
    assert [wait.since for wait in bench.sent(Subscribe)] == [int(NOW * 1_000_000)]
    bench.match(name="b")
    assert bench.status("b") == "PENDING"
    bench.run_task("a")
    assert bench.status("b") == "READY"


def test_the_first_task_of_a_run_waits_for_its_conditions_too() -> None:
    bench = RunHarness(TaskSpec("task", wait_for=both(sleep(5), event())))
    assert bench.status() == "PENDING"
    bench.fire()
    bench.match()
    assert bench.status() == "READY"


@pytest.mark.parametrize("list_name", ["skip_if", "cancel_if"])
def test_a_condition_that_may_come_true_some_day_does_not_hold_a_task_up(list_name: str) -> None:
    spec = TaskSpec("task", **{list_name: both(event(), sleep())})  # type: ignore[arg-type]
    bench = RunHarness(spec)
    assert bench.status() == "READY"
    assert len(bench.sent(Unsubscribe)) == 1


def test_whatever_comes_first_of_a_wait_and_a_skip_decides() -> None:
    spec = TaskSpec("task", wait_for=both(event("go")), skip_if=both(sleep(5)))
    waits, skips = RunHarness(spec), RunHarness(spec)
    waits.match(key="go")
    waits.fire()
    assert waits.status() == "READY"
    skips.fire()
    skips.match(key="go")
    assert skips.status() == "SKIPPED"


def test_a_task_that_is_decided_withdraws_what_it_waited_for() -> None:
    bench = RunHarness(TaskSpec("task", wait_for=either(sleep(5), event())))
    bench.fire()
    assert [wait.id for wait in bench.sent(Unsubscribe)] == [f"{bench.task_run()}#{DAG_WAIT}#paid"]
    assert not bench.sent(CancelTimer)


def test_a_cancelled_run_withdraws_what_its_tasks_waited_for_and_ends_at_once() -> None:
    bench = RunHarness(TaskSpec("task", wait_for=both(sleep(5), event())))
    bench.cancel()
    assert len(bench.sent(CancelTimer)) == len(bench.sent(Unsubscribe)) == 1
    assert bench.run.status == "CANCELLED"


@pytest.mark.parametrize("late", ["sleep", "event"])
def test_a_condition_that_comes_true_after_the_decision_changes_nothing(late: str) -> None:
    bench = RunHarness(TaskSpec("task", wait_for=either(sleep(5), event())))
    bench.cancel()
    assert bench.changes_nothing(bench.fire if late == "sleep" else bench.match)


def test_a_condition_that_comes_true_twice_counts_once() -> None:
    bench = RunHarness(TaskSpec("task", wait_for=both(sleep(5), event())))
    bench.fire()
    assert bench.changes_nothing(bench.fire)


@pytest.mark.parametrize("true_lists", list(itertools.product([False, True], repeat=3)), ids=str)
def test_cancel_goes_before_skip_and_skip_before_run(true_lists: tuple[bool, bool, bool]) -> None:
    lists = dict(zip(("cancel", "skip", "run"), true_lists, strict=True))
    spec = TaskSpec("task", cancel_if=both(event("cancel")), skip_if=both(event("skip")), wait_for=both(event("run")))
    task = TaskRun("task", met=tuple(name for name, true in lists.items() if true))
    expected = next((name for name, true in lists.items() if true), "wait")
    flow = workflow(spec)
    assert dag.verdict(spec, flow, RunHarness(spec=flow).run, task)[0] == expected


# --- on failure -------------------------------------------------------------------------------------------------

ON_FAILURE = TaskSpec("rescue", on_failure=True)


def test_the_task_on_failure_is_skipped_when_nothing_failed_and_is_left_out_of_the_result() -> None:
    bench = RunHarness("task", ON_FAILURE, reply_to="me")
    bench.run_task("task", 1)
    assert bench.status("rescue") == "SKIPPED"
    (result,) = bench.sent(RunResult, Inbox("me"))
    assert list(result.outputs) == ["task"]


def test_the_task_on_failure_starts_at_the_first_final_failure_and_only_once() -> None:
    bench = RunHarness("a", "b", ON_FAILURE)
    bench.fail(bench.grant("a"))
    assert bench.statuses() == {"a": "FAILED", "b": "READY", "rescue": "READY"}
    started = bench.task("rescue")
    bench.fail(bench.grant("b"))
    assert bench.task("rescue") == started
    bench.run_task("rescue")
    assert bench.run.status == "FAILED"


def test_a_failure_that_is_retried_does_not_start_the_task_on_failure() -> None:
    bench = RunHarness(TaskSpec("task", retries=1), ON_FAILURE)
    bench.fail(bench.grant())
    assert bench.status("rescue") == "PENDING"


def test_a_cancelled_run_does_not_start_the_task_on_failure() -> None:
    bench = RunHarness("task", ON_FAILURE)
    bench.cancel()
    assert bench.statuses() == {"task": "CANCELLED", "rescue": "CANCELLED"}


def test_a_cancelled_task_does_not_start_the_task_on_failure() -> None:
    bench = RunHarness("task", ON_FAILURE)
    bench.cancel_task("task")
    assert bench.statuses() == {"task": "CANCELLED", "rescue": "SKIPPED"}


def test_the_task_on_failure_may_stand_anywhere_in_the_definition() -> None:
    bench = RunHarness(ON_FAILURE, "task")
    bench.fail(bench.grant())
    assert bench.status("rescue") == "READY"


# --- definitions ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tasks", "named"),
    [
        ((TaskSpec("a"), TaskSpec("a")), "given twice: a"),
        ((TaskSpec("a", parents=("ghost",)),), "unknown parents: ghost"),
        ((TaskSpec("a", skip_if=both(parent("ghost"))),), "unknown parents: ghost"),
        ((TaskSpec("a", parents=("b",)), TaskSpec("b", parents=("a",)), TaskSpec("c")), "cycle: a, b"),
    ],
)
def test_a_definition_that_cannot_work_is_refused_with_the_names_of_its_tasks(
    tasks: tuple[TaskSpec, ...], named: str
) -> None:
    with pytest.raises(ValueError, match=named):
        topological(tasks)


def test_parents_come_first_and_otherwise_the_order_stays() -> None:
    tasks = (TaskSpec("c", parents=("b",)), TaskSpec("z"), TaskSpec("b"), TaskSpec("a", parents=("b",)))
    assert [task.name for task in topological(tasks)] == ["z", "b", "c", "a"]


# --- generated --------------------------------------------------------------------------------------------------

EXPRESSIONS = (None, "output.n > 0", "output.missing", "output.skipped")


def conditions_on(names: list[str], *, timed: bool) -> st.SearchStrategy[Condition]:
    kinds: list[st.SearchStrategy[Condition]] = []
    if names:
        kinds.append(st.builds(ParentCondition, st.just(""), st.sampled_from(names), st.sampled_from(EXPRESSIONS)))
    if timed:
        kinds.append(st.builds(SleepCondition, st.just(""), st.just(5.0)))
        kinds.append(st.builds(EventCondition, st.just(""), st.sampled_from(["paid", "sent"])))
    return st.one_of(kinds)


def condition_lists(
    names: list[str], prefix: str, *, timed: bool
) -> st.SearchStrategy[tuple[tuple[Condition, ...], ...]]:
    """AND of or-groups, with keys of their own."""
    if not names and not timed:
        return st.just(())
    groups = st.lists(st.lists(conditions_on(names, timed=timed), min_size=1, max_size=2), max_size=2)

    def keyed(drawn: list[list[Condition]]) -> tuple[tuple[Condition, ...], ...]:
        numbers = itertools.count()
        return tuple(
            tuple(type(c)(**{**_fields(c), "key": f"{prefix}{next(numbers)}"}) for c in group) for group in drawn
        )

    return groups.map(keyed)


def _fields(condition: Condition) -> dict[str, Any]:
    return {name: getattr(condition, name) for name in condition.__struct_fields__}


@st.composite
def dags(draw: st.DrawFn, *, timed: bool) -> WorkflowSpec:
    tasks: list[TaskSpec] = []
    for number in range(draw(st.integers(1, 5))):
        names = [task.name for task in tasks]
        parents = draw(st.lists(st.sampled_from(names), unique=True, max_size=3)) if names else []
        wait_for, skip_if, cancel_if = (draw(condition_lists(names, prefix, timed=timed)) for prefix in "wsc")
        retries = draw(st.integers(0, 1))
        tasks.append(
            TaskSpec(
                f"t{number}",
                parents=tuple(parents),
                wait_for=wait_for,
                skip_if=skip_if,
                cancel_if=cancel_if,
                retries=retries,
            )
        )
    if draw(st.booleans()):
        tasks.append(ON_FAILURE)
    return workflow(*tasks)


ENDS = st.sampled_from(["good", "zero", "bad", "bad"])


@settings(max_examples=80, deadline=None)
@given(flow=dags(timed=False), ends=st.lists(ENDS, min_size=6, max_size=6))
def test_conditions_on_parents_lead_to_what_the_rules_say(flow: WorkflowSpec, ends: list[str]) -> None:
    planned = dict(zip((task.name for task in flow.tasks), ends, strict=False))
    bench = RunHarness(spec=flow)
    while (name := _first_ready(bench)) is not None:
        _end(bench, name, planned[name])
    assert bench.run.terminal
    expected: dict[str, str] = {}
    for spec in sorted(flow.tasks, key=lambda spec: spec.on_failure):
        expected[spec.name] = _expected(spec, expected, planned)
    assert bench.statuses() == expected


def _first_ready(bench: RunHarness) -> str | None:
    return next((task.name for task in bench.run.tasks if task.status == "READY"), None)


def _end(bench: RunHarness, name: str, how: str) -> None:
    lease = bench.grant(name)
    if how == "bad":
        bench.fail(lease)
    else:
        bench.finish(lease, {"n": 1 if how == "good" else 0})


def _expected(spec: TaskSpec, statuses: dict[str, str], planned: dict[str, str]) -> str:
    """The rules of the design, told once more in another way."""
    ran = "FAILED" if planned[spec.name] == "bad" else "COMPLETED"
    if spec.on_failure:
        return ran if "FAILED" in statuses.values() else "SKIPPED"
    parents = [statuses[name] for name in spec.dependencies]
    if "FAILED" in parents or "CANCELLED" in parents:
        return "CANCELLED"

    def true(condition: Condition) -> bool:
        assert isinstance(condition, ParentCondition)
        skipped = statuses[condition.parent] == "SKIPPED"
        n = None if skipped else {"good": 1, "zero": 0}[planned[condition.parent]]
        outcomes = {None: True, "output.n > 0": n == 1, "output.missing": False, "output.skipped": skipped}
        return outcomes[condition.expression]

    def holds(groups: tuple[tuple[Condition, ...], ...]) -> bool:
        return all(any(map(true, group)) for group in groups)

    if spec.cancel_if and holds(spec.cancel_if):
        return "CANCELLED"
    if parents and set(parents) == {"SKIPPED"}:
        return "SKIPPED"
    if spec.skip_if and holds(spec.skip_if):
        return "SKIPPED"
    return ran if holds(spec.wait_for) else "SKIPPED"


@settings(max_examples=80, deadline=None)
@given(flow=dags(timed=True), data=st.data())
def test_every_run_ends_once_its_sleeps_are_over_and_its_events_have_come(
    flow: WorkflowSpec, data: st.DataObject
) -> None:
    bench = RunHarness(spec=flow)
    armed: dict[str, SetTimer | Subscribe] = {}
    _note_what_is_armed(bench, armed)
    while not bench.run.terminal:
        ready = [task.name for task in bench.run.tasks if task.status == "READY"]
        what = data.draw(st.sampled_from([*ready, *armed]))
        if what in ready:
            _end(bench, what, data.draw(ENDS))
        else:
            _come_true(bench, armed.pop(what))
        _note_what_is_armed(bench, armed)
    assert not armed, "something is still armed although the run has ended"


def _note_what_is_armed(bench: RunHarness, armed: dict[str, SetTimer | Subscribe]) -> None:
    for message in bench.messages:
        match record_of(message):
            case SetTimer() | Subscribe() as wait:
                armed[wait.id] = wait
            case CancelTimer(id=wait_id) | Unsubscribe(id=wait_id):
                armed.pop(wait_id, None)


def _come_true(bench: RunHarness, wait: SetTimer | Subscribe) -> None:
    name = wait.task_run_id.partition(".")[2]
    if isinstance(wait, SetTimer):
        bench.fire(wait.operation_id, wait.key, name)
    else:
        bench.match(wait.operation_id, wait.condition.key, name)
