"""Why a run is not further: one sentence for each of its tasks."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from sublet_engine.run import explain, transitions
from sublet_engine.run.effects import Effects
from sublet_protocol.messages import RunRequest
from sublet_protocol.specs import TaskSpec
from support.engine_builders import NOW, RUN_ID, RunHarness, both, either, event, parent, run_op, sleep, wait_op

SINCE = "2023-11-14T22:13:20+00:00"


def why(bench: RunHarness, name: str = "task", *pools: str) -> str:
    answer = explain.why(bench.run, bench.workflow, {f"flow:{name}": pools}, bench.now)
    sentence: str = answer["tasks"][name]
    assert sentence in answer["text"]
    return sentence


def evicted(*operations: object) -> RunHarness:
    bench = RunHarness(TaskSpec("task", durable=True))
    bench.evict(bench.grant(), *operations)  # type: ignore[arg-type]
    return bench


def running(step: Callable[[RunHarness, str], None] | None = None, **spec: object) -> RunHarness:
    bench = RunHarness(TaskSpec("task", **spec))  # type: ignore[arg-type]
    lease = bench.grant()
    if step is not None:
        step(bench, lease)
    return bench


def test_a_ready_task_waits_for_a_slot_or_for_a_worker() -> None:
    assert why(RunHarness("task")) == f"ready since {SINCE}, no live worker has registered it"
    assert why(RunHarness("task"), "task", "gpu") == f"ready since {SINCE}, waits for a free slot of pool gpu"


def test_a_running_task_names_its_worker() -> None:
    assert why(running()) == f"running on worker worker-1 since {SINCE}"
    assert why(running(lambda bench, lease: bench.release(lease))).endswith("its slot released")


@pytest.mark.parametrize(
    ("operation", "told"),
    [
        (wait_op("0", sleep(90)), f"a sleep of 90 s since {SINCE} (operation 0)"),
        (wait_op("0", event("order.paid")), f"event order.paid since {SINCE} (operation 0)"),
        (
            wait_op("0", event("paid", expression="input.n == 1")),
            f"event paid where input.n == 1 since {SINCE} (operation 0)",
        ),
        (wait_op("0", event("paid", scope="eu")), f"event paid in scope 'eu' since {SINCE} (operation 0)"),
    ],
)
def test_an_evicted_task_names_what_it_waits_for(operation: object, told: str) -> None:
    assert why(evicted(operation)) == f"evicted since {SINCE}, holds no slot; waits for {told}"


def test_the_explanation_of_an_evicted_task_names_its_child_and_omits_met_conditions() -> None:
    assert "child run" in why(evicted(run_op("0")))
    bench = evicted(wait_op("0", both(event("a"), event("b"))))
    bench.match("0", "a")
    assert "event b since" in why(bench)
    assert "event a" not in why(bench)


def test_a_pending_task_names_its_parents_or_its_conditions() -> None:
    bench = RunHarness(
        "a", TaskSpec("task", parents=("a",), wait_for=(*either(sleep(5), event("go")), *both(event("b"))))
    )
    assert why(bench) == "pending: waits for a"
    bench.run_task("a")
    assert why(bench) == "pending: waits for a sleep of 5 s or event go and event b"
    bench.match(key="go")
    assert why(bench) == "pending: waits for event b"


def test_a_task_on_failure_waits_for_the_others() -> None:
    bench = RunHarness("a", TaskSpec("task", on_failure=True))
    assert why(bench) == "pending: waits for the other tasks of the run"


def test_a_task_that_waits_for_its_retry_or_has_failed_tells_its_error() -> None:
    waits = running(lambda bench, lease: bench.fail(lease), retries=2, backoff_factor=2)
    assert why(waits) == "waits for its retry 1 of 2 (last error: ValueError: no)"
    assert why(running(lambda bench, lease: bench.fail(lease))) == "failed: ValueError: no"


def test_a_skipped_or_cancelled_task_tells_the_reason() -> None:
    bench = RunHarness("a", TaskSpec("task", skip_if=both(parent("a"))))
    bench.run_task("a")
    assert why(bench) == "skipped: its skip_if came true"
    cancelled = RunHarness("task")
    cancelled.cancel()
    assert why(cancelled) == "cancelled: cancelled"


def test_a_run_of_an_unknown_workflow_says_so() -> None:
    run = transitions.create(RunRequest(RUN_ID, "ghost"), None, Effects(NOW))
    assert "no worker has registered a workflow named 'ghost'" in explain.why(run, None, {}, NOW)["text"]


def test_a_version_that_is_not_known_any_more_is_named() -> None:
    bench = RunHarness("task")
    assert bench.run.version in explain.why(bench.run, None, {}, NOW)["text"]
