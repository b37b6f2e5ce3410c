"""The contract of `TimerStore`, for every adapter."""

from __future__ import annotations

from sublet_platform.ports import StoredTimer, TimerStore


def a_timer(timer_id: str, due: float, key: str = "sleep") -> StoredTimer:
    return StoredTimer(id=timer_id, due=due, task_run_id="r.t", operation_id="1", key=key)


async def test_due_timers_come_in_order_of_their_time(timer_store: TimerStore) -> None:
    await timer_store.change_timers([a_timer("c", 3.0), a_timer("a", 1.0), a_timer("b", 2.0), a_timer("d", 4.0)], [])
    assert await timer_store.due_timers(3.0, 10) == [a_timer("a", 1.0), a_timer("b", 2.0), a_timer("c", 3.0)]


async def test_the_limit_of_due_timers_is_respected(timer_store: TimerStore) -> None:
    await timer_store.change_timers([a_timer(str(number), float(number)) for number in range(5)], [])
    assert [timer.id for timer in await timer_store.due_timers(10.0, 2)] == ["0", "1"]
    assert await timer_store.due_timers(10.0, 0) == []


async def test_setting_a_timer_again_changes_nothing(timer_store: TimerStore) -> None:
    await timer_store.change_timers([a_timer("a", 1.0)], [])
    await timer_store.change_timers([a_timer("a", 9.0), a_timer("b", 2.0)], [])
    assert await timer_store.due_timers(10.0, 10) == [a_timer("a", 1.0), a_timer("b", 2.0)]


async def test_a_timer_set_twice_at_once_is_set_once(timer_store: TimerStore) -> None:
    await timer_store.change_timers([a_timer("a", 1.0), a_timer("a", 2.0)], [])
    assert len(await timer_store.due_timers(10.0, 10)) == 1


async def test_timers_are_deleted_and_missing_ones_are_ignored(timer_store: TimerStore) -> None:
    await timer_store.change_timers([a_timer("a", 1.0), a_timer("b", 2.0)], [])
    await timer_store.change_timers([a_timer("c", 3.0)], ["a", "missing"])
    assert [timer.id for timer in await timer_store.due_timers(10.0, 10)] == ["b", "c"]
    await timer_store.change_timers([], [])
