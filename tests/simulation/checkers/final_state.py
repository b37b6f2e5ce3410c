"""Checks at the end: what is stored, what the broker still holds, and what the ledger saw must agree.

They read documents and the ledger alone, and know nothing of the code that wrote them.
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
    "TimeoutError",  # it worked for too long
    "NonDeterminismError",  # it had whims
    "WorkerLost",  # it lost one worker after the other
    "TransportUnavailable",  # an ordinary task could not start its child while the broker was away
    "ExceptionGroup",  # a task group of the program failed
    "TaskRunError",  # so did a child
}
CLOCK_GRAIN_S = 0.000_01


def check(world: SimulatedSystem) -> None:
    """Complain of whatever does not fit."""
    checks: list[Callable[[SimulatedSystem], Problems]] = [
        _clients_were_told_what_is_stored,
        _every_output_was_returned_by_the_last_invocation,
        _errors_were_planned,
        _only_what_was_begun_timed_out,
        _children_gave_their_parents_what_they_returned,
        _logs_are_whole,
        _no_event_is_stored_twice,
        _waits_saw_the_first_event_owed_to_them,
        _nobody_slept_too_little,
        what_is_left,
        _sweepers_found_nothing_without_a_fault,
        _dead_letters_are_garbage,
    ]
    for each in checks:
        for problem in each(world):
            world.complain(problem)


def _tasks(world: SimulatedSystem) -> Iterator[tuple[Run, TaskRun]]:
    for run in world.database.runs.values():
        for task in run.tasks:
            yield run, task


# --- results ----------------------------------------------------------------------------------------------------


def _clients_were_told_what_is_stored(world: SimulatedSystem) -> Problems:
    for run_id, (status, outputs) in world.history.results.items():
        run = world.database.runs.get(run_id)
        if run is None:
            yield f"the client was told that run {run_id} is {status}, but there is none"
        elif run_id in world.observers.replayed:
            continue  # it may have been told of the first end
        elif status != run.status:
            yield f"the client was told that run {run_id} is {status}, but it is {run.status}"
        else:
            for task in run.tasks:
                told, stored = outputs.get(task.name), json.loads(task.output or "null")
                if told != stored and task.name in outputs:
                    yield f"the client was told {told} of {run_id}.{task.name}, but stored is {stored}"


def _every_output_was_returned_by_the_last_invocation(world: SimulatedSystem) -> Problems:
    for run, task in _tasks(world):
        if task.status != "COMPLETED":
            continue
        who = run.task_run_id(task)
        output = json.loads(task.output or "{}")
        task_run_id, returned = world.history.outputs.get(output.get("token", ""), ("", ""))
        if task_run_id != who or json.loads(returned) != output:
            yield f"{who} has the output {output}, which no body of it returned"
        elif not output["token"].startswith(ids.lease_id(who, task.invocation) + "/"):
            yield f"{who} has the output of {output['token']}, but its last invocation is {task.invocation}"


def _errors_were_planned(world: SimulatedSystem) -> Problems:
    expected = EXPECTED_ERRORS | ({"LogFull"} if world.plan.narrow else set())
    for run, task in _tasks(world):
        if task.status == "FAILED" and (task.error is None or task.error.type not in expected):
            yield f"{run.task_run_id(task)} failed with {task.error}"
    for run in world.database.runs.values():
        if run.error is not None:
            yield f"run {run.id} of {run.workflow} could not begin: {run.error.message}"


def _only_what_was_begun_timed_out(world: SimulatedSystem) -> Problems:
    begun = {body.lease for body in world.history.bodies}
    for run, task in _tasks(world):
        who = run.task_run_id(task)
        if task.error is not None and task.error.type == "TimeoutError" and task.error.task_run_id == who:
            leases = {ids.lease_id(who, invocation) for invocation in range(1, task.invocation + 1)}
            if not leases & begun:
                yield f"{who} took too long, although no body of it ever began"


def _children_gave_their_parents_what_they_returned(world: SimulatedSystem) -> Problems:
    for run, task in _tasks(world):
        log = committed_log(world, run, task)
        children = {record.operation_id: record.child_run_id for record in log if record.kind == "run"}
        for record in log:
            child = world.database.runs.get(children.get(record.operation_id) or "")
            if record.kind == "done" and child is not None and child.id not in world.observers.replayed:
                outputs = [json.loads(each.output or "null") for each in child.tasks if each.status == "COMPLETED"]
                given = json.loads(record.result or "null")
                if record.error is None and [given] != outputs:
                    yield f"{run.task_run_id(task)} got {given} from child {child.id}, which returned {outputs}"
                if (record.error is None) != (child.status == "COMPLETED"):
                    yield f"{run.task_run_id(task)} was told {record.error} of child {child.id}: it is {child.status}"


# --- the durable log --------------------------------------------------------------------------------------------


def committed_log(world: SimulatedSystem, run: Run, task: TaskRun) -> list[LogRecord]:
    """The records that count, in order: for each place the one whose epoch the run names for it."""
    records = {(each.seq, each.owner_term): each for each in world.database.log_of.get(run.task_run_id(task), ())}
    log = []
    for seq in range(task.log_length):
        epochs = [segment.owner_term for segment in task.log_segments if segment.first <= seq]
        record = records.get((seq, epochs[-1])) if epochs else None
        if record is not None:
            log.append(record)
    return log


def _logs_are_whole(world: SimulatedSystem) -> Problems:
    for run, task in _tasks(world):
        who = run.task_run_id(task)
        log = committed_log(world, run, task)
        if len(log) != task.log_length:
            yield f"{who} counts {task.log_length} log entries, but {len(log)} are there"
        asked = [record.operation_id for record in log if record.kind != "done"]
        ended = [record.operation_id for record in log if record.kind == "done"]
        if len(set(asked)) != len(asked) or len(set(ended)) != len(ended) or not set(ended) <= set(asked):
            yield f"{who} asked for {asked}, and {ended} ended"
        orders = [record.order for record in log if record.kind == "done"]
        if orders != list(range(1, len(orders) + 1)):
            yield f"the operations of {who} ended in the order {orders}"


# --- waits ------------------------------------------------------------------------------------------------------


def _no_event_is_stored_twice(world: SimulatedSystem) -> Problems:
    for event in sorted(set(world.database.events).difference(world.observers.published)):
        yield f"event {event} is stored, which nobody published"


def _waits_saw_the_first_event_owed_to_them(world: SimulatedSystem) -> Problems:
    """Of each event condition: the first event after the start of the wait that fits, or none if none came."""
    ends = {
        (record.task_run_id, record.operation_id): record
        for run, task in _tasks(world)
        for record in committed_log(world, run, task)
        if record.kind == "done"
    }
    for (task_run_id, operation_id), wait in world.observers.waits.items():
        end = ends.get((task_run_id, operation_id))
        if end is None or wait.child_run_id is not None:
            continue
        met = json.loads(end.result or "{}")["CREATE"]
        for condition in (each for group in wait.groups for each in group):
            if isinstance(condition, EventCondition) and condition.key in met:
                owed = _first_fitting(world, condition, wait)
                if owed is None or json.loads(owed.payload) != met[condition.key][0]:
                    asked = f"{condition} since {wait.since}"
                    yield f"{task_run_id} at {operation_id} waited for {asked}, got {met}, owed was {owed}"


def _first_fitting(world: SimulatedSystem, condition: EventCondition, wait: OpenWait) -> StoredEvent | None:
    events = sorted(world.database.events.values(), key=lambda event: event.seq)
    since = wait.since if condition.since_s is None else min(wait.since, int(condition.since_s * 1_000_000) - 1)
    return next((e for e in events if e.seq > since and e.key == condition.event_key and _fits(e, condition)), None)


def _fits(event: StoredEvent, condition: EventCondition) -> bool:
    """The expressions of the generated programs, read without the library that evaluates them."""
    if condition.scope is not None and condition.scope != event.scope:
        return False
    if condition.expression is None:
        return True
    _, operator, wanted = condition.expression.split()
    n = json.loads(event.payload)["n"]
    return bool(n == int(wanted) if operator == "==" else n >= int(wanted))


def _nobody_slept_too_little(world: SimulatedSystem) -> Problems:
    """In true time, but for the skew between the clocks that measured the sleep."""
    allowed_s = world.plan.greatest_skew_s + CLOCK_GRAIN_S
    for (task_run_id, place), slept in world.history.sleeps.items():
        if slept.over_s is not None and slept.over_s - slept.asked_s < slept.duration_s - allowed_s:
            yield f"{task_run_id} at {place} slept {slept.over_s - slept.asked_s} s of {slept.duration_s} s"


# --- what is left -----------------------------------------------------------------------------------------------


def what_is_left(world: SimulatedSystem) -> Problems:
    """After the last run has ended: tickets, leases, timers, subscriptions, messages that nobody has handled. Some of
    it takes a while to go."""
    for name, queue in world.cluster.queues.items():
        if name.startswith("sublet.pool."):
            held = sum(len(subscription.unacked) for subscription in queue.subscriptions)
            if held or queue.ready:
                yield f"{name}: {held} tickets are held and {len(queue.ready)} are ready although nothing is to do"
    for run in world.database.runs.values():
        if not run.terminal:
            yield f"run {run.id} of {run.workflow} is {run.status}"
    for run, task in _tasks(world):
        if task.lease is not None:
            yield f"{run.task_run_id(task)} still has a lease"
    for timer in world.database.timers:
        yield f"timer {timer} is left, and nobody waits for it"
    for subscription in world.database.subscriptions:
        yield f"subscription {subscription} is left, and nobody waits for it"
    for event in sorted(world.observers.published.difference(world.database.events)):
        yield f"event {event} was published and is not stored"
    if len(_dead_letters(world)) < world.garbage:
        yield f"not all of the {world.garbage} pieces of garbage that were thrown in are among the dead letters"
    yield from _runs_are_those_that_events_start(world)


def _runs_are_those_that_events_start(world: SimulatedSystem) -> Problems:
    triggered = Counter((run.trigger.event_id, run.workflow) for run in world.database.runs.values() if run.trigger)
    due = Counter((e.id, workflow) for e in world.database.events.values() for workflow in _started_by(e))
    for event_id, workflow in due - triggered:
        yield f"event {event_id} has not started a run of {workflow}"
    for event_id, workflow in triggered - due:
        yield f"event {event_id} has started a run of {workflow} that it should not"


def _started_by(event: StoredEvent) -> list[str]:
    """As the workflows say in `declarations`."""
    started = ["eager"] if event.key.startswith("order.") else []
    if event.key == "order.placed" and event.scope == "shop" and json.loads(event.payload)["n"] >= 1:
        started.append("choosy")
    return started


def _sweepers_found_nothing_without_a_fault(world: SimulatedSystem) -> Problems:
    if world.anomalies and not world.plan.faults:
        yield f"sweepers found {world.anomalies} although nothing went wrong"


def _dead_letters_are_garbage(world: SimulatedSystem) -> Problems:
    strangers = [body for body in _dead_letters(world) if body != GARBAGE]
    if strangers:
        yield f"dead letters that are no garbage: {strangers[:3]}"


def _dead_letters(world: SimulatedSystem) -> list[bytes]:
    return [message.body for message in world.cluster.queues[DEAD].ready]
