from __future__ import annotations

from sublet_engine.run.state import TaskRun
from sublet_engine.shard.deadlines import Deadlines


def ready(name: str, until: float) -> TaskRun:
    return TaskRun(name, status="READY", schedule_deadline=until)


def never_unclear(run_id: str, task: TaskRun, at: float) -> bool:
    return False


def test_deadlines_expire_in_order_and_only_if_they_are_current() -> None:
    tasks = {"a": ready("a", 10.0), "b": ready("b", 5.0), "c": ready("c", 7.0)}
    deadlines = Deadlines(lambda run_id, name: tasks.get(name))
    for task in tasks.values():
        deadlines.add("run", task)
    tasks["c"] = ready("c", 20.0)  # it was moved
    struck = []
    for _, task in deadlines.expire(12.0, never_unclear):
        struck.append(task.name)
        del tasks[task.name]
    assert struck == ["b", "a"]


def test_an_undecided_deadline_expires_the_next_time() -> None:
    task = ready("a", 10.0)
    deadlines = Deadlines(lambda run_id, name: task)
    deadlines.add("run", task)
    assert not list(deadlines.expire(12.0, lambda run_id, task, at: True))
    assert [run_id for run_id, _ in deadlines.expire(13.0, never_unclear)] == ["run"]


def test_deadlines_that_were_met_are_removed() -> None:
    tasks = {"stays": ready("stays", 1e9)}
    deadlines = Deadlines(lambda run_id, name: tasks.get(name), slack=100)
    deadlines.add("run", tasks["stays"])
    for number in range(1_000):
        deadlines.add("run", ready(f"gone-{number}", 1e6 + number))
        deadlines.trim()
    assert len(deadlines) <= 110
    assert [task.name for _, task in deadlines.expire(2e9, never_unclear) if tasks.pop(task.name)] == ["stays"]
