"""Checks at the end: the stored documents, the messages left in the broker, and the history must agree.

The checks read documents and the history only. They share no code with the system that wrote them.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from simulation.faults.driver import GARBAGE
from sublet_engine.run.state import LogRecord, OpenWait, Run, TaskRun
from sublet_platform.ports import StoredEvent
from sublet_protocol import ids
from sublet_protocol.specs import EventCondition
from sublet_protocol.topology import DEAD

if TYPE_CHECKING:
    from simulation.system.simulated_system import SimulatedSystem

Problems = Iterator[str]

EXPECTED_ERRORS = {
    "Planned",  # the program said so
    "TimeoutError",  # it exceeded its execution timeout
    "NonDeterminismError",  # it has a step that differs at each replay
    "WorkerLost",  # it lost too many workers
    "TransportUnavailable",  # an ordinary task could not start its child while the broker was away
    "ExceptionGroup",  # a task group of the program failed
    "TaskRunError",  # a child failed
}
CLOCK_GRAIN_S = 0.000_01


def check(system: SimulatedSystem) -> None:
    """Report each problem as a violation."""
    checks: list[Callable[[SimulatedSystem], Problems]] = [
        _clients_received_the_stored_results,
        _every_output_was_returned_by_the_last_invocation,
        _errors_were_planned,
        _only_started_tasks_timed_out,
        _parents_received_what_children_returned,
        _logs_are_whole,
        _no_event_is_stored_twice,
        _waits_got_the_first_matching_event,
        _no_sleep_ended_early,
        leaks,
        _sweepers_found_nothing_without_a_fault,
        _dead_letters_are_garbage,
    ]
    for find_problems in checks:
        for problem in find_problems(system):
            system.report_violation(problem)


def _tasks(system: SimulatedSystem) -> Iterator[tuple[Run, TaskRun]]:
    for run in system.database.runs.values():
        for task in run.tasks:
            yield run, task


# --- results ----------------------------------------------------------------------------------------------------


def _clients_received_the_stored_results(system: SimulatedSystem) -> Problems:
    for run_id, (status, outputs) in system.history.results.items():
        run = system.database.runs.get(run_id)
        if run is None:
            yield f"the client received {status} for run {run_id}, but no such run is stored"
        elif run_id in system.observers.replayed:
            continue  # the client may have received the result before the replay
        elif status != run.status:
            yield f"the client received {status} for run {run_id}, but {run.status} is stored"
        else:
            for task in run.tasks:
                received, stored = outputs.get(task.name), json.loads(task.output or "null")
                if received != stored and task.name in outputs:
                    yield f"the client received {received} for {run_id}.{task.name}, but {stored} is stored"


def _every_output_was_returned_by_the_last_invocation(system: SimulatedSystem) -> Problems:
    for run, task in _tasks(system):
        if task.status != "COMPLETED":
            continue
        task_run_id = run.task_run_id(task)
        output = json.loads(task.output or "{}")
        returned_by, returned = system.history.outputs.get(output.get("token", ""), ("", ""))
        if returned_by != task_run_id or json.loads(returned) != output:
            yield f"{task_run_id} has the output {output}, which no body of it returned"
        elif not output["token"].startswith(ids.lease_id(task_run_id, task.invocation) + "/"):
            yield f"{task_run_id} has the output of {output['token']}, but its last invocation is {task.invocation}"


def _errors_were_planned(system: SimulatedSystem) -> Problems:
    expected = EXPECTED_ERRORS | ({"LogFull"} if system.plan.has_tiny_limits else set())
    for run, task in _tasks(system):
        if task.status == "FAILED" and (task.error is None or task.error.type not in expected):
            yield f"{run.task_run_id(task)} failed with {task.error}"
    for run in system.database.runs.values():
        if run.error is not None:
            yield f"run {run.id} of {run.workflow} could not start: {run.error.message}"


def _only_started_tasks_timed_out(system: SimulatedSystem) -> Problems:
    started = {body.lease for body in system.history.bodies}
    for run, task in _tasks(system):
        task_run_id = run.task_run_id(task)
        if task.error is not None and task.error.type == "TimeoutError" and task.error.task_run_id == task_run_id:
            leases = {ids.lease_id(task_run_id, invocation) for invocation in range(1, task.invocation + 1)}
            if not leases & started:
                yield f"{task_run_id} timed out, although no body of it ever started"


def _parents_received_what_children_returned(system: SimulatedSystem) -> Problems:
    for run, task in _tasks(system):
        log = committed_log(system, run, task)
        children = {record.operation_id: record.child_run_id for record in log if record.kind == "run"}
        for record in log:
            child = system.database.runs.get(children.get(record.operation_id) or "")
            if record.kind == "done" and child is not None and child.id not in system.observers.replayed:
                outputs = [json.loads(task.output or "null") for task in child.tasks if task.status == "COMPLETED"]
                received = json.loads(record.result or "null")
                if record.error is None and [received] != outputs:
                    yield f"{run.task_run_id(task)} got {received} from child {child.id}, which returned {outputs}"
                if (record.error is None) != (child.status == "COMPLETED"):
                    yield f"{run.task_run_id(task)} got error {record.error} of child {child.id}: it is {child.status}"


# --- the durable log --------------------------------------------------------------------------------------------


def committed_log(system: SimulatedSystem, run: Run, task: TaskRun) -> list[LogRecord]:
    """The valid records, in order: for each sequence number the record of the owner term that the run names for it."""
    stored = system.database.log_of.get(run.task_run_id(task), ())
    records = {(record.seq, record.owner_term): record for record in stored}
    log = []
    for seq in range(task.log_length):
        owner_terms = [segment.owner_term for segment in task.log_segments if segment.first <= seq]
        record = records.get((seq, owner_terms[-1])) if owner_terms else None
        if record is not None:
            log.append(record)
    return log


def _logs_are_whole(system: SimulatedSystem) -> Problems:
    for run, task in _tasks(system):
        task_run_id = run.task_run_id(task)
        log = committed_log(system, run, task)
        if len(log) != task.log_length:
            yield f"{task_run_id} counts {task.log_length} log entries, but {len(log)} are stored"
        asked = [record.operation_id for record in log if record.kind != "done"]
        ended = [record.operation_id for record in log if record.kind == "done"]
        if len(set(asked)) != len(asked) or len(set(ended)) != len(ended) or not set(ended) <= set(asked):
            yield f"{task_run_id} requested the operations {asked}, and {ended} ended"
        orders = [record.order for record in log if record.kind == "done"]
        if orders != list(range(1, len(orders) + 1)):
            yield f"the operations of {task_run_id} ended in the order {orders}"


# --- waits ------------------------------------------------------------------------------------------------------


def _no_event_is_stored_twice(system: SimulatedSystem) -> Problems:
    for event in sorted(set(system.database.events).difference(system.observers.published)):
        yield f"event {event} is stored, but was never published"


def _waits_got_the_first_matching_event(system: SimulatedSystem) -> Problems:
    """For each event condition: the first matching event after the start of the wait, or none if none was published."""
    ends = {
        (record.task_run_id, record.operation_id): record
        for run, task in _tasks(system)
        for record in committed_log(system, run, task)
        if record.kind == "done"
    }
    for (task_run_id, operation_id), wait in system.observers.waits.items():
        end = ends.get((task_run_id, operation_id))
        if end is None or wait.child_run_id is not None:
            continue
        met = json.loads(end.result or "{}")["CREATE"]
        for condition in (condition for group in wait.groups for condition in group):
            if isinstance(condition, EventCondition) and condition.key in met:
                expected = _first_matching(system, condition, wait)
                if expected is None or json.loads(expected.payload) != met[condition.key][0]:
                    waited_for = f"{condition} since {wait.since}"
                    yield f"{task_run_id} at {operation_id} waited for {waited_for}, got {met}, expected {expected}"


def _first_matching(system: SimulatedSystem, condition: EventCondition, wait: OpenWait) -> StoredEvent | None:
    events = sorted(system.database.events.values(), key=lambda event: event.seq)
    since = wait.since if condition.since_s is None else min(wait.since, int(condition.since_s * 1_000_000) - 1)
    return next((e for e in events if e.seq > since and e.key == condition.event_key and _matches(e, condition)), None)


def _matches(event: StoredEvent, condition: EventCondition) -> bool:
    """Evaluate the expressions of generated programs without the CEL library that the system uses."""
    if condition.scope is not None and condition.scope != event.scope:
        return False
    if condition.expression is None:
        return True
    _, operator, wanted = condition.expression.split()
    n = json.loads(event.payload)["n"]
    return bool(n == int(wanted) if operator == "==" else n >= int(wanted))


def _no_sleep_ended_early(system: SimulatedSystem) -> Problems:
    """In true time, except for the skew between the clocks that measured the sleep."""
    allowed_s = system.plan.greatest_skew_s + CLOCK_GRAIN_S
    for (task_run_id, step), slept in system.history.sleeps.items():
        if slept.ended_s is not None and slept.ended_s - slept.started_s < slept.duration_s - allowed_s:
            yield f"{task_run_id} at {step} slept {slept.ended_s - slept.started_s} s of {slept.duration_s} s"


# --- leaks ------------------------------------------------------------------------------------------------------


def leaks(system: SimulatedSystem) -> Problems:
    """What must be gone some time after the last run has ended: tickets, leases, timers, subscriptions, unhandled
    messages."""
    for name, queue in system.cluster.queues.items():
        if name.startswith("sublet.pool."):
            held = sum(len(subscription.unacked) for subscription in queue.subscriptions)
            if held or queue.ready:
                yield f"{name}: {held} tickets are held and {len(queue.ready)} are ready although no task is ready"
    for run in system.database.runs.values():
        if not run.terminal:
            yield f"run {run.id} of {run.workflow} is {run.status}"
    for run, task in _tasks(system):
        if task.lease is not None:
            yield f"{run.task_run_id(task)} still has a lease"
    for timer in system.database.timers:
        yield f"timer {timer} is left, but no task waits for it"
    for subscription in system.database.subscriptions:
        yield f"subscription {subscription} is left, but no task waits for it"
    for event in sorted(system.observers.published.difference(system.database.events)):
        yield f"event {event} was published, but is not stored"
    if len(_dead_letters(system)) < system.garbage:
        yield f"some of the {system.garbage} unreadable messages that were published are not among the dead letters"
    yield from _events_started_the_right_runs(system)


def _events_started_the_right_runs(system: SimulatedSystem) -> Problems:
    triggered = Counter((run.trigger.event_id, run.workflow) for run in system.database.runs.values() if run.trigger)
    due = Counter((e.id, workflow) for e in system.database.events.values() for workflow in _started_by(e))
    for event_id, workflow in due - triggered:
        yield f"event {event_id} has not started a run of {workflow}"
    for event_id, workflow in triggered - due:
        yield f"event {event_id} has started a run of {workflow}, but must not"


def _started_by(event: StoredEvent) -> list[str]:
    """According to the workflows in `declarations`."""
    started = ["eager"] if event.key.startswith("order.") else []
    if event.key == "order.placed" and event.scope == "shop" and json.loads(event.payload)["n"] >= 1:
        started.append("choosy")
    return started


def _sweepers_found_nothing_without_a_fault(system: SimulatedSystem) -> Problems:
    if system.anomalies and not system.plan.faults:
        yield f"sweepers found {system.anomalies} although no fault was injected"


def _dead_letters_are_garbage(system: SimulatedSystem) -> Problems:
    unexpected = [body for body in _dead_letters(system) if body != GARBAGE]
    if unexpected:
        yield f"dead letters that could be read: {unexpected[:3]}"


def _dead_letters(system: SimulatedSystem) -> list[bytes]:
    return [message.body for message in system.cluster.queues[DEAD].ready]
