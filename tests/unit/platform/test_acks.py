"""The acknowledgement frames that are sent to the broker."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from sublet_platform.rabbit.acks import AckTracker


def test_a_contiguous_prefix_is_one_frame() -> None:
    assert AckTracker().settle([1, 2, 3]) == [(3, True)]


def test_each_contiguous_prefix_is_one_frame() -> None:
    ack_tracker = AckTracker()
    ack_tracker.settle([1, 2, 3])
    assert ack_tracker.settle([6, 4, 5]) == [(6, True)]


def test_a_single_tag_needs_no_multiple() -> None:
    assert AckTracker().settle([1]) == [(1, False)]


def test_tags_outside_the_prefix_have_frames_of_their_own() -> None:
    assert AckTracker().settle([2, 4]) == [(2, False), (4, False)]


def test_nothing_above_a_gap_is_settled_with_the_prefix() -> None:
    assert AckTracker().settle([1, 2, 4]) == [(2, True), (4, False)]


def test_settling_a_gap_extends_the_prefix_to_the_tags_above_it() -> None:
    ack_tracker = AckTracker()
    ack_tracker.settle([2, 3])
    assert ack_tracker.settle([1]) == [(1, False)]
    assert ack_tracker.settle([4, 5]) == [(5, True)]


def test_no_tag_is_settled_twice() -> None:
    ack_tracker = AckTracker()
    ack_tracker.settle([1, 2, 4])
    assert ack_tracker.settle([1, 2, 4]) == []
    assert ack_tracker.settle([4, 3]) == [(3, False)]


@given(st.lists(st.lists(st.integers(1, 30), max_size=12), max_size=12))
def test_the_broker_settles_exactly_the_given_tags_and_each_once(calls: list[list[int]]) -> None:
    ack_tracker = AckTracker()
    outstanding = set(range(1, 31))
    for tags in calls:
        before = set(outstanding)
        for tag, multiple in ack_tracker.settle(tags):
            assert tag in outstanding, "RabbitMQ would close the channel"
            outstanding -= {each for each in outstanding if each <= tag} if multiple else {tag}
        assert outstanding == before - set(tags)
