"""Many messages in few bodies."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from sublet_protocol import limits
from sublet_protocol.chunking import pack
from sublet_protocol.messages import CancelTimer, Record, decode_for_timer


@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 9))))
def test_every_message_arrives_under_its_key_and_in_order(sent: list[tuple[str, int]]) -> None:
    bodies = list(pack((key, CancelTimer(id=str(n))) for key, n in sent))
    for key in "ab":
        received = [message.id for to, body in bodies if to == key for message in decode_for_timer(body)]
        assert received == [str(n) for to, n in sent if to == key]
    assert len(bodies) <= 2


def test_a_body_is_bounded_in_items_and_bytes() -> None:
    many: list[tuple[str, Record]] = [("k", CancelTimer(id=str(n))) for n in range(limits.BATCH_MAX_ITEMS + 1)]
    assert [len(decode_for_timer(body)) for _, body in pack(many)] == [limits.BATCH_MAX_ITEMS, 1]
    large: list[tuple[str, Record]] = [("k", CancelTimer(id="x" * 100_000)) for _ in range(5)]
    assert [len(decode_for_timer(body)) for _, body in pack(large)] == [2, 2, 1]


def test_a_message_larger_than_a_body_travels_alone() -> None:
    ids = ["a", "x" * limits.BATCH_MAX_BYTES, "b"]
    bodies = pack(("k", CancelTimer(id=each)) for each in ids)
    assert [[m.id for m in decode_for_timer(body)] for _, body in bodies] == [[each] for each in ids]


def test_no_messages_give_no_bodies() -> None:
    assert list(pack([])) == []
