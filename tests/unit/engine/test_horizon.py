"""The timers in memory: complete up to the horizon, never early, bounded."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st

from sublet_engine.timer.horizon import Changes, Horizon, plan
from sublet_protocol.messages import CancelTimer, SetTimer


@dataclass(frozen=True)
class T:
    id: str
    due: float


def horizon_up_to(until: float, *timers: T, capacity: int = 100) -> Horizon[T]:
    horizon: Horizon[T] = Horizon(capacity)
    horizon.extend(timers, until, limit=1_000)
    return horizon


def set_timer(timer_id: str, due: float = 1.0) -> SetTimer:
    return SetTimer(id=timer_id, due=due, task_run_id="run.task", operation_id="1", key="k")


def test_a_new_horizon_has_to_load_at_once() -> None:
    assert Horizon[T](10).next_at() == float("-inf")


def test_due_timers_are_taken_earliest_first_and_none_early() -> None:
    horizon = horizon_up_to(100, T("b", 2), T("a", 1), T("c", 3))
    assert horizon.next_at() == 1
    assert [timer.id for timer in horizon.take_due(2, limit=10)] == ["a", "b"]
    assert horizon.next_at() == 3
    assert horizon.take_due(2.999, limit=10) == []


def test_a_timer_beyond_the_horizon_is_left_to_the_store() -> None:
    horizon = horizon_up_to(100)
    horizon.add([T("near", 50), T("far", 200)])
    assert "near" in horizon
    assert "far" not in horizon


def test_the_next_page_has_to_be_loaded_when_the_horizon_is_reached() -> None:
    horizon = horizon_up_to(100, T("a", 1))
    horizon.take_due(1, limit=10)
    assert horizon.next_at() == 100


def test_a_full_page_ends_the_horizon_at_its_last_timer() -> None:
    horizon: Horizon[T] = Horizon(2)
    horizon.extend([T("a", 1), T("b", 2)], until=100, limit=2)
    assert horizon.until == 2
    horizon.add([T("c", 50)])
    assert "c" not in horizon


def test_a_removed_timer_does_not_fire_and_does_not_wake() -> None:
    horizon = horizon_up_to(100, T("a", 1), T("b", 2))
    horizon.remove(["a", "unknown"])
    assert horizon.next_at() == 2
    assert [timer.id for timer in horizon.take_due(5, limit=10)] == ["b"]


def test_a_timer_removed_and_added_again_has_its_new_time() -> None:
    horizon = horizon_up_to(100, T("a", 1))
    horizon.remove(["a"])
    horizon.add([T("a", 5)])
    assert horizon.take_due(4, limit=10) == []
    assert horizon.take_due(5, limit=10) == [T("a", 5)]
    assert horizon.take_due(100, limit=10) == []


def test_an_id_that_is_there_stays_as_it_is() -> None:
    horizon = horizon_up_to(100, T("a", 5))
    horizon.add([T("a", 1)])
    assert horizon.next_at() == 5


def test_timers_that_could_not_be_fired_are_returned() -> None:
    horizon = horizon_up_to(100, T("a", 1))
    horizon.return_unfired(horizon.take_due(1, limit=10))
    assert horizon.take_due(1, limit=10) == [T("a", 1)]


def test_loading_finds_timers_that_ought_to_have_been_there() -> None:
    horizon = horizon_up_to(100)
    strays = horizon.extend([T("lost", 60), T("new", 120)], until=200, limit=10)
    assert strays == [T("lost", 60)]
    assert horizon.next_at() == 60


def test_memory_is_bounded_and_the_later_ones_are_left_to_the_store() -> None:
    horizon = horizon_up_to(10_000, capacity=10)
    horizon.add(T(str(n), float(n)) for n in range(1, 1_001))
    assert len(horizon) <= 20
    assert horizon.next_at() == 1
    assert horizon.until <= 20


def test_a_set_and_a_cancel_of_one_id_leave_the_cancel() -> None:
    assert plan([set_timer("a"), CancelTimer(id="a")]) == Changes((), ("a",))


def test_the_last_message_about_an_id_counts() -> None:
    anew = set_timer("a", due=9.0)
    assert plan([set_timer("a"), CancelTimer(id="a"), anew]) == Changes((anew,), ())
    assert plan([CancelTimer(id="a"), anew, CancelTimer(id="a")]) == Changes((), ("a",))


def test_the_first_of_two_sets_counts() -> None:
    first = set_timer("a", due=1.0)
    assert plan([first, set_timer("a", due=2.0)]).set == (first,)


class Store:
    """What the timer's collection does, in a dict."""

    def __init__(self) -> None:
        self.timers: dict[str, T] = {}

    def page(self, until: float, limit: int) -> list[T]:
        due = sorted((timer for timer in self.timers.values() if timer.due <= until), key=lambda timer: timer.due)
        return due[:limit]


_steps = st.lists(
    st.one_of(
        st.tuples(st.just("set"), st.integers(0, 20), st.integers(0, 30)),
        st.tuples(st.just("cancel"), st.integers(0, 20), st.just(0)),
        st.tuples(st.just("wait"), st.integers(0, 5), st.just(0)),
        st.tuples(st.just("takeover"), st.just(0), st.just(0)),
    ),
    max_size=60,
)


@settings(max_examples=400, deadline=None)
@given(_steps, st.integers(1, 5), st.integers(1, 12))
def test_every_stored_timer_fires_when_it_is_due_whatever_the_pages(
    steps: list[tuple[str, int, int]], limit: int, window: int
) -> None:
    store, horizon, now = Store(), Horizon[T](limit), 0.0
    for what, number, delay in steps:
        name = str(number)
        if what == "set":
            timer = store.timers.setdefault(name, T(name, now + delay))
            horizon.add([timer])
        elif what == "cancel":
            store.timers.pop(name, None)
            horizon.remove([name])
        elif what == "takeover":
            horizon.forget()
        else:
            now += number
        while horizon.next_at() <= now:
            for timer in horizon.take_due(now, limit):
                assert store.timers.pop(timer.id).due <= now
            if horizon.until <= now:
                assert horizon.extend(store.page(now + window, limit), now + window, limit) == []
        assert all(timer.due > now for timer in store.timers.values())
        assert len(horizon) <= 2 * limit + 1
