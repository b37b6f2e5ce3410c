"""The fixtures that all tests share."""

from __future__ import annotations

import pytest

from support.clocks import ManualClock

pytest_plugins = ("support.server_fixtures", "support.stack_fixtures")


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()
