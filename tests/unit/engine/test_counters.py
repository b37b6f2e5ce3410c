"""What a shard counts and reports for metrics."""

from __future__ import annotations

import pytest

from sublet_protocol import limits
from sublet_protocol.specs import TaskSpec
from support.engine_builders import memo_op, sleep, wait_op, workflow
from support.shard_harness import ShardHarness, evicted


def shard_with_checkpoint(entries: int) -> ShardHarness:
    """A shard in which one durable task was evicted with this many entries in its log."""
    harness = ShardHarness(workflow(TaskSpec("task", durable=True)))
    harness.hello()
    harness.request("run")
    grant = harness.claim(harness.tickets(kind="durable")[0], kind="durable")
    assert grant is not None
    memos = [memo_op(f"memo-{number}") for number in range(entries - 1)]
    harness.handle(evicted(grant, *memos, wait_op("wait", sleep())))
    return harness


def test_a_durable_log_that_reaches_the_warning_length_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "LOG_WARN_ENTRIES", 3)
    harness = shard_with_checkpoint(entries=3)
    assert harness.shard.state.counters.long_logs == {"run.task": 3}


def test_a_shorter_durable_log_is_not_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "LOG_WARN_ENTRIES", 3)
    assert shard_with_checkpoint(entries=2).shard.state.counters.long_logs == {}


def test_a_long_log_is_reported_again_only_when_it_has_grown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "LOG_WARN_ENTRIES", 3)
    harness = shard_with_checkpoint(entries=3)
    harness.shard.state.counters.clear()
    harness.cancel("run")
    assert harness.shard.state.counters.long_logs == {}
