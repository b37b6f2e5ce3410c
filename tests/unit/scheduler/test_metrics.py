"""Warnings of the scheduler about its shards."""

from __future__ import annotations

import logging

import pytest

from sublet_platform.metrics import ServiceMetrics
from sublet_protocol import limits
from sublet_scheduler.metrics import SchedulerMetrics
from support.shard_harness import ShardHarness


def test_one_warning_for_each_batch_names_the_long_logs_the_limit_and_the_cure(
    caplog: pytest.LogCaptureFixture,
) -> None:
    shard, metrics = ShardHarness().shard, SchedulerMetrics(ServiceMetrics())
    shard.state.counters.long_logs.update({"run-1.task": 10_000, "run-2.task": 12_345})
    with caplog.at_level(logging.WARNING):
        metrics.observe(3, shard)
        metrics.observe(3, shard)
    [record] = caplog.records
    text = record.getMessage()
    assert "shard 3" in text
    assert "run-2.task has 12345 entries, run-1.task has 10000 entries" in text
    assert str(limits.LOG_MAX_ENTRIES) in text
    assert "child runs" in text
