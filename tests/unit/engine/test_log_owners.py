"""The durable log across owners: which records count, and what a writer left behind that never committed its run."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sublet_engine.run import durable_log
from sublet_engine.run.state import LogRecord, LogSegment
from sublet_protocol.specs import TaskSpec
from support.engine_builders import RunHarness, memo_op, sleep, wait_op

DURABLE = TaskSpec("task", durable=True)


def test_the_records_of_one_owner_are_one_segment() -> None:
    bench = RunHarness(DURABLE)
    bench.evict(bench.grant(), memo_op("0"), wait_op("1", sleep()))
    bench.fire("1")
    assert bench.task().log_segments == (LogSegment(0, "epoch-1"),)
    assert [entry.kind for entry in bench.whole_log] == ["memo", "wait", "done"]


def test_the_next_owner_begins_a_segment_with_its_first_record() -> None:
    bench = RunHarness(DURABLE)
    bench.evict(bench.grant(), wait_op("0", sleep()))
    bench.owner_term = "epoch-2"
    assert bench.task().log_segments == (LogSegment(0, "epoch-1"),)
    bench.fire("0")
    assert bench.task().log_segments == (LogSegment(0, "epoch-1"), LogSegment(1, "epoch-2"))
    assert list(bench.entries()) == ["0"]


def test_what_an_owner_wrote_that_never_committed_its_run_does_not_count() -> None:
    bench = RunHarness(DURABLE)
    bench.evict(bench.grant(), wait_op("0", sleep()), wait_op("1", sleep()), blocked=[("0", "1")])
    committed = bench.run
    bench.fire("1")
    bench.run, bench.owner_term = committed, "epoch-2"
    assert bench.entries()["1"].done is None
    bench.fire("0")
    entries = bench.entries()
    assert entries["0"].done is not None
    assert entries["1"].done is None


def test_log_records_of_two_owners_have_different_ids_at_the_same_seq() -> None:
    bench = RunHarness(DURABLE)
    bench.evict(bench.grant(), wait_op("0", sleep()))
    committed = bench.run
    bench.fire("0")
    first = bench.log
    bench.run, bench.owner_term = committed, "epoch-2"
    bench.fire("0")
    assert first[0].seq == bench.log[0].seq
    assert first[0].id != bench.log[0].id


def test_a_log_with_a_missing_record_is_not_complete() -> None:
    bench = RunHarness(DURABLE)
    bench.evict(bench.grant(), memo_op("0"), memo_op("1"))
    with pytest.raises(AssertionError, match="log has 1 of 2 entries"):
        durable_log.committed(bench.task(), bench.whole_log[1:])


def test_every_log_record_has_its_owner_term_and_its_time() -> None:
    bench = RunHarness(DURABLE)
    bench.grant()
    bench.worker_lost(bench.lease())
    bench.evict(bench.grant(), memo_op("0"))
    (record,) = bench.log
    assert (record.version, record.retry_count, record.at) == (bench.run.version, 1, bench.now)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 4), st.integers(0, 4)), min_size=1, max_size=8))
def test_the_committed_records_are_found_whatever_earlier_owners_left_behind(owners: list[tuple[int, int]]) -> None:
    """Each owner commits some records, and writes some more that it never commits."""
    bench = RunHarness(DURABLE)
    written: list[str] = []
    for number, (kept, lost) in enumerate(owners):
        bench.owner_term = f"epoch-{number}"
        for _ in range(kept):
            _write(bench, f"kept {len(written)}")
            written.append(f"kept {len(written)}")
        committed = bench.run
        for extra in range(lost):
            _write(bench, f"lost {number}.{extra}")
        bench.run = committed
    assert list(bench.entries()) == written
    assert bench.task().log_length == len(written)


def _write(bench: RunHarness, operation_id: str) -> None:
    lease = bench.lease() if bench.task().lease else bench.grant()
    bench.record(lease, memo_op(operation_id), number=bench.task().reports + 1)


def test_leftover_records_are_ignored_in_any_order_of_the_store() -> None:
    task = RunHarness(DURABLE).task()
    records = [_memo(0, "a"), _memo(1, "a"), _memo(2, "a"), _memo(2, "b"), _memo(3, "b"), _memo(3, "a")]
    segments = (LogSegment(0, "a"), LogSegment(2, "b"))
    task = type(task)("task", log_length=3, log_segments=segments)
    found = durable_log.committed(task, reversed(records))
    assert [(record.seq, record.owner_term) for record in found] == [(0, "a"), (1, "a"), (2, "b")]


def _memo(seq: int, owner_term: str) -> LogRecord:
    return LogRecord(f"{seq}{owner_term}", "run.task", seq, owner_term, str(seq), "memo", 0.0)
