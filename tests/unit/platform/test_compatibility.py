"""Databases and virtual hosts that a service refuses, and the error texts."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from sublet_platform.compatibility import IncompatibleFormat, check_database, check_virtual_host
from sublet_protocol.topology import FORMAT, FORMAT_MARKER, REQUESTS, topology


def test_a_database_of_this_format_is_accepted() -> None:
    check_database("sublet", {"shards": 4, "format": FORMAT})


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        ({"shards": 4}, "no format number"),
        ({}, "no format number"),
        ({"shards": 4, "format": FORMAT - 1}, f"has format {FORMAT - 1}"),
        ({"shards": 4, "format": FORMAT + 1}, f"has format {FORMAT + 1}"),
        ({"shards": 4, "format": str(FORMAT)}, f"has format {FORMAT}"),
    ],
)
def test_a_database_of_another_format_is_refused(settings: Mapping[str, int | str], found: str) -> None:
    with pytest.raises(IncompatibleFormat) as caught:
        check_database("orders", settings)
    text = str(caught.value)
    assert "'orders'" in text
    assert found in text
    assert "SUBLET_MONGO_DATABASE" in text
    assert "finish or cancel the runs" in text


@pytest.mark.parametrize(("in_use", "marked"), [(False, False), (True, True), (False, True)])
def test_a_virtual_host_that_is_new_or_marked_is_accepted(in_use: bool, marked: bool) -> None:
    check_virtual_host("/", in_use=in_use, marked=marked)


def test_a_virtual_host_in_use_without_a_marker_is_refused() -> None:
    with pytest.raises(IncompatibleFormat) as caught:
        check_virtual_host("orders", in_use=True, marked=False)
    text = str(caught.value)
    assert "'orders'" in text
    assert REQUESTS in text
    assert FORMAT_MARKER in text
    assert "another virtual host" in text
    assert "delete" in text


def test_the_marker_is_declared_before_all_other_exchanges() -> None:
    assert topology(1).exchanges[0].name == FORMAT_MARKER
