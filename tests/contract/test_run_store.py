"""The contract of `RunStore`, for every adapter."""

from __future__ import annotations

import dataclasses

import msgspec
import pytest

from contract.records import (
    AWKWARD,
    ERROR,
    a_full_run,
    a_full_task,
    a_live_run,
    a_log_record,
    a_run,
    a_workflow,
    run_ids_in_buckets,
)
from sublet_engine.run.state import OutgoingMessage, Run, TaskRun, TaskStatus
from sublet_platform.ports import RevisionConflict, RunChange, RunFilter, RunStore, WorkerRecord
from sublet_protocol import ids
from sublet_protocol.destinations import Inbox
from sublet_protocol.messages import ParentLink, Trigger
from support.clocks import ManualClock

replace = msgspec.structs.replace
ALL_BUCKETS = range(ids.BUCKETS)


async def create(store: RunStore, *runs: Run) -> None:
    await store.commit([RunChange(None, run) for run in runs])


async def load(store: RunStore, run_id: str) -> Run:
    [run] = await store.load_runs([run_id])
    return run


async def live(store: RunStore, buckets: range | list[int] = ALL_BUCKETS) -> list[str]:
    return [run.id async for chunk in store.load_live(list(buckets)) for run in chunk]


# --- runs -------------------------------------------------------------------------------------------------


async def test_a_run_is_loaded_as_it_was_stored(run_store: RunStore) -> None:
    runs = [a_full_run(), a_run("bare")]
    await create(run_store, *runs)
    assert [await load(run_store, run.id) for run in runs] == runs


async def test_missing_runs_are_left_out(run_store: RunStore) -> None:
    await create(run_store, a_run("a"), a_run("b"))
    found = await run_store.load_runs(["a", "missing", "b"])
    assert sorted(run.id for run in found) == ["a", "b"]
    assert await run_store.load_runs([]) == []


async def test_the_waits_of_tasks_are_loaded_without_the_other_fields(run_store: RunStore) -> None:
    await create(run_store, a_full_run("full"), a_run("bare"))
    full = a_full_task()
    waits = TaskRun(full.name, full.status, replays=full.replays, met=full.met, open_waits=full.open_waits)
    found = await run_store.load_waits(["full", "bare", "missing"])
    assert {run_id: list(tasks) for run_id, tasks in found.items()} == {"full": [TaskRun("empty"), waits], "bare": []}
    assert await run_store.load_waits([]) == {}


async def test_every_field_can_change(run_store: RunStore) -> None:
    before = a_run("full", tasks=(TaskRun("empty"), TaskRun("charge")))
    after = replace(a_full_run(), workflow=before.workflow, revision=2, owner_term="e-2")
    await create(run_store, before)
    await run_store.commit([RunChange(before, after)])
    assert await load(run_store, "full") == after


async def test_every_field_can_be_reset_to_its_default(run_store: RunStore) -> None:
    before = a_full_run()
    after = a_run("full", tasks=(TaskRun("empty"), TaskRun("charge")), revision=2)
    await create(run_store, before)
    await run_store.commit([RunChange(before, after)])
    assert await load(run_store, "full") == after


async def test_a_change_of_one_task_leaves_the_others_unchanged(run_store: RunStore) -> None:
    before = a_run(tasks=(a_full_task(), TaskRun("b"), a_full_task()))
    changed = TaskRun("b", status="RUNNING", invocation=1)
    after = replace(before, tasks=(before.tasks[0], changed, before.tasks[2]), revision=2)
    await create(run_store, before)
    await run_store.commit([RunChange(before, after)])
    assert await load(run_store, before.id) == after


async def test_tasks_can_be_added_and_removed(run_store: RunStore) -> None:
    before = a_run(tasks=())
    more = replace(before, tasks=(TaskRun("a"), TaskRun("b")), revision=2)
    fewer = replace(more, tasks=more.tasks[:1], revision=3)
    await create(run_store, before)
    await run_store.commit([RunChange(before, more)])
    assert await load(run_store, before.id) == more
    await run_store.commit([RunChange(more, fewer)])
    assert await load(run_store, before.id) == fewer


async def test_the_outbox_is_stored_and_emptied_with_the_state(run_store: RunStore) -> None:
    before = a_run()
    item = OutgoingMessage(Inbox("sublet.inbox.client.1"), b'{"t":"run_result"}')
    after = replace(before, outbox=(item,), owner_term="e-2", revision=2)
    emptied = replace(after, outbox=(), revision=3)
    await create(run_store, before)
    await run_store.commit([RunChange(before, after)])
    assert (await load(run_store, before.id)).outbox == (item,)
    await run_store.commit([RunChange(after, emptied)])
    assert (await load(run_store, before.id)).outbox == ()


async def test_an_empty_commit_does_nothing(run_store: RunStore) -> None:
    await run_store.commit([])


async def test_many_runs_are_committed_together(run_store: RunStore) -> None:
    old = [a_run(f"old-{number}") for number in range(50)]
    new = [a_run(f"new-{number}") for number in range(50)]
    changed = [replace(run, status="RUNNING", revision=2) for run in old]
    await create(run_store, *old)
    pairs = [RunChange(before, after) for before, after in zip(old, changed, strict=True)]
    await run_store.commit([*pairs, *(RunChange(None, run) for run in new)])
    wanted = changed + new
    found = {run.id: run for run in await run_store.load_runs([run.id for run in wanted])}
    assert found == {run.id: run for run in wanted}


# --- conflicts --------------------------------------------------------------------------------------------


async def test_a_run_changed_by_another_writer_is_not_overwritten(run_store: RunStore) -> None:
    before = a_run()
    theirs = replace(before, owner_term="theirs", revision=2)
    ours = replace(before, owner_term="ours", revision=2)
    await create(run_store, before)
    await run_store.commit([RunChange(before, theirs)])
    with pytest.raises(RevisionConflict):
        await run_store.commit([RunChange(before, ours)])
    assert await load(run_store, before.id) == theirs


async def test_a_run_created_by_another_writer_is_not_overwritten(run_store: RunStore) -> None:
    theirs = a_run(owner_term="theirs")
    await create(run_store, theirs)
    with pytest.raises(RevisionConflict):
        await create(run_store, a_run(owner_term="ours"))
    assert await load(run_store, theirs.id) == theirs


async def test_a_missing_run_cannot_be_changed(run_store: RunStore) -> None:
    before = a_run()
    with pytest.raises(RevisionConflict):
        await run_store.commit([RunChange(before, replace(before, revision=2))])
    assert await run_store.load_runs([before.id]) == []


async def test_a_conflict_of_one_run_does_not_prevent_the_commit_of_the_others(run_store: RunStore) -> None:
    taken, free = a_run("taken"), a_run("free")
    await create(run_store, taken, free)
    await run_store.commit([RunChange(taken, replace(taken, revision=2))])
    changes = [
        RunChange(None, a_run("taken")),
        RunChange(taken, replace(taken, owner_term="late", revision=2)),
        RunChange(free, replace(free, owner_term="ours", revision=2)),
        RunChange(None, a_run("new")),
    ]
    with pytest.raises(RevisionConflict):
        await run_store.commit(changes)
    assert (await load(run_store, "free")).owner_term == "ours"
    assert (await load(run_store, "new")).id == "new"
    assert (await load(run_store, "taken")).owner_term == "e-1"


# --- live runs --------------------------------------------------------------------------------------------


async def test_live_runs_are_those_with_a_task_that_is_ready_or_running(run_store: RunStore) -> None:
    statuses: list[TaskStatus] = ["PENDING", "READY", "RUNNING", "EVICTED", "BACKOFF", "COMPLETED"]
    await create(run_store, *(a_run(status, tasks=(TaskRun("t", status=status),)) for status in statuses))
    assert sorted(await live(run_store)) == ["READY", "RUNNING"]


async def test_a_run_is_not_live_while_all_its_tasks_wait(run_store: RunStore) -> None:
    before = a_live_run("r")
    after = replace(before, tasks=(TaskRun("t", status="EVICTED"),), revision=2)
    again = replace(after, tasks=(TaskRun("t", status="READY"),), revision=3)
    await create(run_store, before)
    await run_store.commit([RunChange(before, after)])
    assert await live(run_store) == []
    await run_store.commit([RunChange(after, again)])
    assert await live(run_store) == ["r"]


async def test_live_runs_are_loaded_by_bucket(run_store: RunStore) -> None:
    by_slot = run_ids_in_buckets(4)
    await create(run_store, *(a_live_run(run_id) for run_id in by_slot.values()))
    assert sorted(await live(run_store, [0, 2])) == sorted([by_slot[0], by_slot[2]])
    assert await live(run_store, []) == []


async def test_live_runs_are_loaded_in_chunks_oldest_first(run_store: RunStore) -> None:
    runs = [a_live_run(f"run-{number}", created_at=float(number)) for number in range(1_100)]
    await create(run_store, *reversed(runs))
    chunks = [chunk async for chunk in run_store.load_live(list(ALL_BUCKETS))]
    assert len(chunks) > 1
    assert [run for chunk in chunks for run in chunk] == runs


async def test_waiting_tasks_are_counted_by_reason(run_store: RunStore) -> None:
    by_slot = run_ids_in_buckets(2)
    before = a_run(by_slot[0], tasks=(TaskRun("a", status="BACKOFF"), TaskRun("b"), TaskRun("c")))
    await create(run_store, before, a_run(by_slot[1], tasks=(TaskRun("a"),)))
    assert dict(await run_store.count_waiting([0, 1])) == {"backoff": 1, "parents": 3}
    after = replace(before, tasks=(TaskRun("a", status="READY"), *before.tasks[1:]), revision=2)
    await run_store.commit([RunChange(before, after)])
    assert dict(await run_store.count_waiting([0])) == {"parents": 2}


# --- the durable log --------------------------------------------------------------------------------------


async def test_a_log_is_loaded_in_order(run_store: RunStore) -> None:
    records = [a_log_record("r.t", seq) for seq in range(5)]
    full = a_log_record(
        "r.u",
        0,
        kind="done",
        fingerprint="f",
        asked="sleep 5 s",
        label="nap",
        result='{"a": 1}',
        error=ERROR,
        child_run_id="c",
        order=3,
        position=1_700_000_000_000_000,
        version="1",
        retry_count=2,
    )
    await run_store.append_log([full, *reversed(records)])
    assert await run_store.load_logs(["r.t", "r.u", "r.missing"]) == [*records, full]
    assert await run_store.load_logs([]) == []


async def test_an_existing_log_record_is_not_changed(run_store: RunStore) -> None:
    first = a_log_record("r.t", 0, asked="first")
    await run_store.append_log([first])
    await run_store.append_log([a_log_record("r.t", 0, asked="second"), a_log_record("r.t", 1)])
    assert await run_store.load_logs(["r.t"]) == [first, a_log_record("r.t", 1)]


async def test_log_records_of_other_owner_terms_are_loaded_too(run_store: RunStore) -> None:
    await run_store.append_log([a_log_record("r.t", 0, "e-1"), a_log_record("r.t", 0, "e-2")])
    records = await run_store.load_logs(["r.t"])
    assert sorted(record.owner_term for record in records) == ["e-1", "e-2"]


async def test_appending_no_log_records_does_nothing(run_store: RunStore) -> None:
    await run_store.append_log([])


# --- listing ----------------------------------------------------------------------------------------------


async def listed(store: RunStore, query: RunFilter) -> list[str]:
    return [run.id for run in await store.list_runs(query)]


async def test_runs_are_listed_newest_first_page_by_page(run_store: RunStore) -> None:
    await create(run_store, *(a_run(str(number), created_at=float(number)) for number in range(5)))
    assert await listed(run_store, RunFilter(limit=2)) == ["4", "3"]
    assert await listed(run_store, RunFilter(limit=2, offset=2)) == ["2", "1"]
    assert await listed(run_store, RunFilter(limit=2, offset=4)) == ["0"]


async def test_runs_are_listed_by_time_status_and_workflow(run_store: RunStore) -> None:
    await create(
        run_store,
        a_run("a", created_at=1.0, workflow="x", status="QUEUED"),
        a_run("b", created_at=2.0, workflow="y", status="RUNNING"),
        a_run("c", created_at=3.0, workflow="z", status="FAILED"),
    )
    assert await listed(run_store, RunFilter(since=2.0)) == ["c", "b"]
    assert await listed(run_store, RunFilter(until=2.0)) == ["a"]
    assert await listed(run_store, RunFilter(statuses=("QUEUED", "FAILED"))) == ["c", "a"]
    assert await listed(run_store, RunFilter(workflows=("x", "y"))) == ["b", "a"]
    assert await listed(run_store, RunFilter(workflows=("x", "y"), statuses=("RUNNING",))) == ["b"]


async def test_a_run_is_listed_under_its_current_status(run_store: RunStore) -> None:
    before = a_run("r")
    await create(run_store, before)
    await run_store.commit([RunChange(before, replace(before, status="COMPLETED", revision=2))])
    assert await listed(run_store, RunFilter(statuses=("QUEUED",))) == []
    assert await listed(run_store, RunFilter(statuses=("COMPLETED",))) == ["r"]


async def test_runs_are_listed_by_parent_and_by_event(run_store: RunStore) -> None:
    await create(
        run_store,
        a_run("child", parent=ParentLink("p.t")),
        a_run("triggered", trigger=Trigger("event-1", "order.paid")),
        a_run("other"),
    )
    assert await listed(run_store, RunFilter(parent_task_run_id="p.t")) == ["child"]
    assert await listed(run_store, RunFilter(event_id="event-1")) == ["triggered"]


@pytest.mark.parametrize("key", sorted(AWKWARD))
async def test_runs_are_listed_by_any_metadata(run_store: RunStore, key: str) -> None:
    await create(run_store, a_run("a", metadata=AWKWARD), a_run("b", metadata={key: "something else"}), a_run("c"))
    assert await listed(run_store, RunFilter(metadata={key: AWKWARD[key]})) == ["a"]


async def test_a_filter_by_metadata_requires_all_of_it(run_store: RunStore) -> None:
    await create(run_store, a_run("a", metadata={"x": 1, "y": 2}), a_run("b", metadata={"x": 1, "y": 3}))
    assert await listed(run_store, RunFilter(metadata={"x": 1, "y": 2})) == ["a"]
    assert await listed(run_store, RunFilter(metadata={"x": "1"})) == []


async def test_runs_are_listed_by_long_metadata(run_store: RunStore) -> None:
    await create(run_store, a_run("a", metadata={"long": "x" * 60_000}), a_run("b", metadata={"long": "y" * 60_000}))
    assert await listed(run_store, RunFilter(metadata={"long": "x" * 60_000})) == ["a"]


async def test_the_order_of_keys_in_metadata_objects_does_not_matter(run_store: RunStore) -> None:
    await create(run_store, a_run("a", metadata={"o": {"x": 1, "y": 2}}))
    assert await listed(run_store, RunFilter(metadata={"o": {"y": 2, "x": 1}})) == ["a"]


# --- workflows, workers, settings -------------------------------------------------------------------------


async def test_workflows_are_loaded_with_the_latest_registration_last(run_store: RunStore) -> None:
    await run_store.save_workflow(a_workflow("w", "2"), 20.0)
    await run_store.save_workflow(a_workflow("w", "1"), 10.0)
    await run_store.save_workflow(a_workflow("v", "1"), 15.0)
    records = await run_store.load_workflows()
    assert [(record.spec.name, record.spec.version) for record in records] == [("w", "1"), ("v", "1"), ("w", "2")]
    assert records[0].spec == a_workflow("w", "1")


async def test_registering_a_version_again_makes_it_the_latest_but_never_older(run_store: RunStore) -> None:
    await run_store.save_workflow(a_workflow("w", "1"), 10.0)
    await run_store.save_workflow(a_workflow("w", "2"), 20.0)
    await run_store.save_workflow(a_workflow("w", "1"), 30.0)
    await run_store.save_workflow(a_workflow("w", "1"), 5.0)
    records = await run_store.load_workflows()
    assert [(record.spec.version, record.registered_at) for record in records] == [("2", 20.0), ("1", 30.0)]


def a_worker(worker_id: str, now: float, **fields: object) -> WorkerRecord:
    worker = WorkerRecord(
        id=worker_id,
        pool="p-12345678",
        name="p",
        inbox=f"sublet.inbox.worker.{worker_id}",
        slots=4,
        durable_slots=100,
        actions=("w:t", "w:u"),
        started_at=now,
        last_seen_at=now,
    )
    return dataclasses.replace(worker, **fields)  # type: ignore[arg-type]


async def test_workers_are_loaded_as_last_saved(run_store: RunStore, clock: ManualClock) -> None:
    worker = a_worker("w-1", clock.now())
    seen = dataclasses.replace(worker, last_seen_at=clock.now() + 4.0, slots=8)
    await run_store.save_worker(worker)
    await run_store.save_worker(seen)
    assert await run_store.load_workers() == [seen]


async def test_a_worker_that_is_gone_is_retained_for_a_day(run_store: RunStore, clock: ManualClock) -> None:
    gone = a_worker("gone", clock.now(), gone=True)
    silent = a_worker("silent", clock.now())
    await run_store.save_worker(gone)
    await run_store.save_worker(silent)
    clock.advance(86_399.0)
    assert sorted(worker.id for worker in await run_store.load_workers()) == ["gone", "silent"]
    clock.advance(2.0)
    assert [worker.id for worker in await run_store.load_workers()] == ["silent"]


async def test_scheduler_heartbeats_are_retained_for_a_minute(run_store: RunStore) -> None:
    assert dict(await run_store.beat("a", 1_000.0)) == {"a": 1_000.0}
    assert dict(await run_store.beat("b", 1_030.0)) == {"a": 1_000.0, "b": 1_030.0}
    assert dict(await run_store.beat("b", 1_061.0)) == {"b": 1_061.0}
