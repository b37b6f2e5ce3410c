"""Declarations: their specs, and arguments that are refused."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from pydantic import BaseModel

from sublet import (
    DEFAULT_DURABLE_TASK_EVICTION_POLICY,
    ClientConfig,
    DefaultFilter,
    EmptyModel,
    EvictionPolicy,
    ParentCondition,
    Priority,
    SleepCondition,
    Sublet,
    TaskDefaults,
    UserEventCondition,
    or_,
)
from sublet._declare.durations import seconds_of, text_of
from sublet_protocol import specs
from sublet_protocol.limits import NAME_MAX_CHARS


class Order(BaseModel):
    id: int


@pytest.fixture
def sublet() -> Sublet:
    return Sublet(ClientConfig())


def noop(input: Any, ctx: Any) -> None: ...


async def aio_noop(input: Any, ctx: Any) -> None: ...


# --- standalone tasks -----------------------------------------------------------------------------------------------


def test_a_standalone_task_is_a_workflow_of_one_task_in_lower_case(sublet: Sublet) -> None:
    task = sublet.task(name="Charge-Card")(noop)
    assert task.name == "Charge-Card"
    assert task.spec().name == "Charge-Card"
    assert [t.name for t in task.spec().tasks] == ["charge-card"]


def test_a_standalone_task_is_named_after_its_function(sublet: Sublet) -> None:
    assert sublet.task()(noop).name == "noop"
    assert sublet.durable_task()(aio_noop).name == "aio_noop"


def test_defaults_are_the_documented_ones(sublet: Sublet) -> None:
    (spec,) = sublet.task()(noop).spec().tasks
    assert (spec.schedule_timeout_s, spec.execution_timeout_s, spec.retries) == (300.0, 60.0, 0)
    assert (spec.backoff_factor, spec.backoff_max_s, spec.durable) == (None, None, False)
    assert sublet.task()(noop).spec().default_priority == Priority.LOW


def test_the_spec_has_every_declared_option(sublet: Sublet) -> None:
    task = sublet.task(
        name="t",
        on_events=["order.*"],
        version="v7",
        default_priority=Priority.HIGH,
        default_filters=[DefaultFilter(expression="input.x == payload.y", scope="s", payload={"y": 1})],
        schedule_timeout="1h30m",
        execution_timeout=timedelta(seconds=1.5),
        retries=3,
        backoff_factor=2.0,
        backoff_max_seconds=60,
    )(noop)
    spec = task.spec()
    assert (spec.on_events, spec.label, spec.default_priority) == (("order.*",), "v7", 3)
    assert spec.default_filters == (specs.EventFilter("input.x == payload.y", "s", {"y": 1}),)
    (only,) = spec.tasks
    assert (only.schedule_timeout_s, only.execution_timeout_s, only.retries) == (5400.0, 1.5, 3)
    assert (only.backoff_factor, only.backoff_max_s) == (2.0, 60)


def test_a_durable_task_takes_a_durable_slot_and_is_evicted_at_once_by_default(sublet: Sublet) -> None:
    task = sublet.durable_task()(aio_noop)
    assert task.spec().tasks[0].slot_kind == "durable"
    assert task.task.eviction_policy == DEFAULT_DURABLE_TASK_EVICTION_POLICY == EvictionPolicy(ttl=timedelta(0))
    assert sublet.durable_task(eviction_policy=None)(aio_noop).task.eviction_policy is None


def test_a_durable_task_must_be_async(sublet: Sublet) -> None:
    with pytest.raises(TypeError, match="durable task 'noop' must be an async function"):
        sublet.durable_task()(noop)  # type: ignore[arg-type]


def test_equal_declarations_have_equal_versions_and_others_not(sublet: Sublet) -> None:
    one, same = sublet.task(name="t")(noop), sublet.task(name="t")(noop)
    other = sublet.task(name="t", retries=1)(noop)
    assert one.spec().version == same.spec().version != other.spec().version


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"retries": -1}, "retries of task 'noop' must be a whole number from 0"),
        ({"backoff_factor": 0}, "backoff_factor of task 'noop' must be greater than 0"),
        ({"backoff_max_seconds": 0}, "backoff_max_seconds of task 'noop' must be greater than 0"),
        ({"execution_timeout": "0s"}, "execution_timeout of task 'noop' must be longer than zero"),
        ({"execution_timeout": "5 minutes"}, "execution_timeout of task 'noop' '5 minutes' is not understood"),
        ({"schedule_timeout": timedelta(seconds=-1)}, "schedule_timeout of task 'noop' must not be negative"),
        ({"name": "x" * (NAME_MAX_CHARS + 1)}, f"has 129 characters; the limit is {NAME_MAX_CHARS}"),
        ({"name": "a\nb"}, "must not hold control characters"),
        ({"name": "ü" * 111}, "has 222 bytes in UTF-8; the limit is 220"),
        ({"default_priority": 4}, r"a priority is 1 \(LOW\), 2 \(MEDIUM\) or 3 \(HIGH\), not 4"),
        ({"on_events": [""]}, "an event key in on_events must not be empty"),
    ],
)
def test_the_error_for_a_task_that_is_not_valid_names_the_task(
    sublet: Sublet, options: dict[str, Any], message: str
) -> None:
    declare: Any = sublet.task
    with pytest.raises(ValueError, match=message):
        declare(**options)(noop)


def test_a_bad_filter_is_refused_when_it_is_made() -> None:
    with pytest.raises(ValueError, match="not valid CEL"):
        DefaultFilter(expression="input.x ==", scope="s")


# --- workflows ------------------------------------------------------------------------------------------------------


def test_the_spec_of_a_dag_lists_parents_before_children(sublet: Sublet) -> None:
    flow = sublet.workflow(name="Flow", input_validator=Order)
    first = flow.task()(noop)
    second = flow.task(name="Second", parents=[first])(noop)
    assert [task.name for task in flow.tasks] == ["noop", "second"]
    assert [(t.name, t.parents) for t in flow.spec().tasks] == [("noop", ()), ("second", ("noop",))]
    assert (second.workflow_name, second.parents) == ("Flow", [first])


def test_a_workflow_without_tasks_has_no_spec(sublet: Sublet) -> None:
    with pytest.raises(ValueError, match="workflow 'empty' has no tasks"):
        sublet.workflow(name="empty").spec()


def test_two_tasks_of_one_name_are_refused_where_the_second_is_declared(sublet: Sublet) -> None:
    flow = sublet.workflow(name="flow")
    flow.task(name="A")(noop)
    with pytest.raises(ValueError, match="workflow 'flow' already has a task 'a'"):
        flow.task(name="a")(noop)


def test_a_parent_of_another_workflow_is_refused(sublet: Sublet) -> None:
    stranger = sublet.workflow(name="other").task(name="stranger")(noop)
    flow = sublet.workflow(name="flow")
    flow.task(parents=[stranger])(noop)
    with pytest.raises(ValueError, match="unknown parents: stranger"):
        flow.spec()


def test_a_standalone_is_no_parent_but_its_task_is(sublet: Sublet) -> None:
    standalone = sublet.task(name="extract")(noop)
    flow = sublet.workflow(name="flow", input_validator=Order)
    with pytest.raises(TypeError, match="parents of task 'noop' must be tasks"):
        flow.task(parents=[standalone])(noop)  # type: ignore[list-item]
    flow.add_task(standalone)
    flow.task(parents=[standalone.task])(noop)
    assert [t.name for t in flow.spec().tasks] == ["extract", "noop"]
    assert flow.tasks[0].workflow_name == "flow"
    assert flow.tasks[0].decode_input(b'{"id": 1}') == Order(id=1)
    assert standalone.task.workflow_name == "extract"


def test_on_success_runs_after_all_leaves_wherever_it_was_declared(sublet: Sublet) -> None:
    flow = sublet.workflow(name="flow")
    root = flow.task(name="root")(noop)
    flow.on_success_task(name="done")(noop)
    flow.task(name="left", parents=[root])(noop)
    flow.task(name="right", parents=[root])(noop)
    flow.on_failure_task(name="oops")(noop)
    specs = {task.name: task for task in flow.spec().tasks}
    assert specs["done-on-success"].parents == ("left", "right")
    assert (specs["oops-on-failure"].on_failure, specs["oops-on-failure"].parents) == (True, ())


def test_there_is_only_one_on_failure_and_one_on_success_task(sublet: Sublet) -> None:
    flow = sublet.workflow(name="flow")
    flow.on_failure_task()(noop)
    flow.on_success_task()(noop)
    with pytest.raises(ValueError, match="already has an on-failure task"):
        flow.on_failure_task(name="another")
    with pytest.raises(ValueError, match="already has an on-success task"):
        flow.on_success_task(name="another")


def test_task_defaults_apply_to_options_that_a_task_does_not_set(sublet: Sublet) -> None:
    flow = sublet.workflow(name="flow", task_defaults=TaskDefaults(retries=4, execution_timeout="10m"))
    flow.task(name="open")(noop)
    flow.task(name="own", retries=1, execution_timeout="5s")(noop)
    own_open = {task.name: (task.retries, task.execution_timeout_s) for task in flow.spec().tasks}
    assert own_open == {"open": (4, 600.0), "own": (1, 5.0)}


# --- conditions -----------------------------------------------------------------------------------------------------


def test_the_spec_has_conditions_as_or_groups(sublet: Sublet) -> None:
    flow = sublet.workflow(name="flow")
    start = flow.task(name="start")(noop)
    since = datetime(2026, 1, 1, tzinfo=UTC)
    flow.task(
        name="end",
        parents=[start],
        wait_for=[
            or_(
                SleepCondition(timedelta(minutes=5)),
                UserEventCondition("paid", "input.ok", consider_events_since=since),
            ),
            UserEventCondition("packed", scope="s1", readable_data_key="box"),
        ],
        skip_if=[ParentCondition(start, "output.skip == true")],
        cancel_if=[SleepCondition("1h")],
    )(noop)
    end = flow.spec().task("end")
    assert end.wait_for == (
        (
            specs.SleepCondition("sleep:5m", 300.0),
            specs.EventCondition("paid", "paid", "input.ok", None, since.timestamp()),
        ),
        (specs.EventCondition("box", "packed", None, "s1"),),
    )
    assert end.skip_if == ((specs.ParentCondition("start", "start", "output.skip == true"),),)
    assert end.cancel_if == ((specs.SleepCondition("sleep:1h", 3600.0),),)


def test_two_conditions_of_one_task_must_have_different_keys(sublet: Sublet) -> None:
    flow = sublet.workflow(name="flow")
    with pytest.raises(ValueError, match="given twice: 'sleep:10s'"):
        flow.task(wait_for=[SleepCondition("10s")], skip_if=[or_(SleepCondition("10s"))])(noop)
    flow.task(wait_for=[SleepCondition("10s")], skip_if=[SleepCondition("10s", readable_data_key="other")])(noop)


def test_a_parent_condition_must_be_about_a_parent(sublet: Sublet) -> None:
    flow = sublet.workflow(name="flow")
    start = flow.task(name="start")(noop)
    with pytest.raises(ValueError, match="ParentCondition on 'start', which is none of its parents"):
        flow.task(skip_if=[ParentCondition(start, "true")])(noop)


def test_a_bad_expression_is_refused_when_the_condition_is_made(sublet: Sublet) -> None:
    start = sublet.workflow(name="flow").task()(noop)
    with pytest.raises(ValueError, match="not valid CEL"):
        UserEventCondition("paid", "input.ok &&")
    with pytest.raises(ValueError, match="it can use output"):
        ParentCondition(start, "input.x == 1")


def test_an_or_group_needs_conditions() -> None:
    with pytest.raises(ValueError, match="at least one"):
        or_()
    with pytest.raises(TypeError, match="takes conditions, not str"):
        or_("sleep")  # type: ignore[arg-type]


def test_an_argument_that_is_not_a_condition_is_refused(sublet: Sublet) -> None:
    with pytest.raises(TypeError, match="expected a condition"):
        sublet.workflow(name="flow").task(wait_for=["paid"])(noop)  # type: ignore[list-item]


# --- namespaces -----------------------------------------------------------------------------------------------------


def test_a_namespace_is_put_before_workflows_and_events() -> None:
    sublet = Sublet(ClientConfig(namespace="Team"))
    flow = sublet.workflow(name="flow", on_events=["order.paid"])
    flow.task(name="t", wait_for=[UserEventCondition("go")])(noop)
    spec = flow.spec()
    assert (spec.name, spec.on_events, spec.tasks[0].name) == ("team_flow", ("team_order.paid",), "t")
    assert spec.tasks[0].wait_for == ((specs.EventCondition("go", "team_go"),),)
    assert sublet.workflow(name="team_flow").name == "team_flow"


def test_settings_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SUBLET_AMQP_URL", "amqp://somewhere/")
    monkeypatch.setenv("SUBLET_NAMESPACE", "x")
    config = ClientConfig()
    assert (config.amqp_url, config.namespace) == ("amqp://somewhere/", "x_")
    assert "somewhere" not in repr(config)


# --- durations ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("duration", "seconds"),
    [("5m", 300), ("1h30m", 5400), ("10s", 10), ("1.5s", 1.5), ("250ms", 0.25), ("1d", 86400), ("2 h 5 m", 7500)],
)
def test_durations_are_numbers_with_units(duration: str, seconds: float) -> None:
    assert seconds_of(duration) == pytest.approx(seconds)


@pytest.mark.parametrize("duration", ["", "5", "m", "-5m", "5m!", "1:30", "5M"])
def test_other_durations_are_refused_with_examples(duration: str) -> None:
    with pytest.raises(ValueError, match="write numbers with units"):
        seconds_of(duration)
    with pytest.raises(TypeError, match="not int"):
        seconds_of(5)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("duration", "text"),
    [
        (timedelta(hours=2), "2h"),
        (timedelta(minutes=90), "90m"),
        (timedelta(seconds=90), "90s"),
        (timedelta(seconds=0.5), "0.5s"),
        (timedelta(0), "0s"),
        ("1h30m", "1h30m"),
    ],
)
def test_a_sleep_condition_is_named_by_its_duration(duration: timedelta | str, text: str) -> None:
    assert text_of(duration) == text


def test_an_input_is_an_empty_model_unless_declared(sublet: Sublet) -> None:
    assert sublet.task()(noop).input_validator_type is EmptyModel
    assert sublet.task(input_validator=Order)(noop).input_validator_type is Order


def test_positional_options_keep_their_order(sublet: Sublet) -> None:
    workflow = sublet.workflow(name="positional")
    root = workflow.task("root", "1m", "2m", None, 3, 1.5, 10)(noop)
    leaf = workflow.task("leaf", "1m", "2m", [root], 1, None, None, [SleepCondition("1s")])(noop)
    assert (root.name, root.schedule_timeout, root.execution_timeout) == ("root", "1m", "2m")
    assert (root.retries, root.backoff_factor, root.backoff_max_seconds) == (3, 1.5, 10)
    assert leaf.parents == [root]
    assert len(leaf.wait_for) == 1


def test_an_unknown_option_is_refused_where_the_task_is_declared(sublet: Sublet) -> None:
    declare: Any = sublet.task
    with pytest.raises(TypeError, match="retry"):
        declare(retry=3)


def test_a_decorator_of_a_workflow_without_brackets_is_refused(sublet: Sublet) -> None:
    workflow = sublet.workflow(name="w")
    with pytest.raises(TypeError, match=r"write @workflow\.task\(\)"):
        workflow.task(lambda input, ctx: None)  # type: ignore[arg-type]


def test_items_of_run_many_that_are_no_bulk_items_are_refused_with_the_cure(sublet: Sublet) -> None:
    with pytest.raises(TypeError, match="create_bulk_run_item"):
        sublet.stubs.task(name="t").run_many([Order(id=1)])  # type: ignore[list-item]


def test_a_payload_that_is_not_a_dictionary_is_refused_with_the_cure(sublet: Sublet) -> None:
    with pytest.raises(TypeError, match="must be a dictionary, not list"):
        sublet.event.push("order.paid", [1])  # type: ignore[arg-type]
