"""Tickets and claims: one ticket for what can run now, and a claim that decides whatever the ticket was issued for."""

from __future__ import annotations

import pytest

from sublet_protocol import limits
from sublet_protocol.destinations import Inbox
from sublet_protocol.messages import Grant, GrantDeclined, NoTask, Ping, Revoked, RunRequest, SlotReleased, Ticket
from sublet_protocol.specs import SlotKind, TaskSpec
from support.engine_builders import both, event, sleep, wait_op, workflow
from support.shard_harness import ShardHarness, claim, evicted, failed, finished, inbox_of

FLOW = workflow("task")
DURABLE = workflow(TaskSpec("task", durable=True), name="durable")


def world(slots: int = 1, workers: int = 1) -> ShardHarness:
    made = ShardHarness(FLOW, DURABLE)
    for number in range(1, workers + 1):
        made.hello(f"w{number}", slots=slots)
    return made


# --- tickets ----------------------------------------------------------------------------------------------------


def test_one_ticket_is_issued_for_a_ready_task() -> None:
    there = world(slots=5)
    there.request("a")
    assert len(there.tickets()) == 1
    there.heartbeat(slots=5)
    assert there.tickets() == []


def test_no_ticket_is_issued_for_a_task_that_is_not_ready() -> None:
    there = ShardHarness(workflow(TaskSpec("a", wait_for=both(event())), TaskSpec("b", parents=("a",))))
    there.hello()
    there.request("a")
    assert there.tickets() == []


@pytest.mark.parametrize(("ready", "slots", "issued"), [(3, 1, 1), (3, 2, 2), (3, 5, 3), (1, 5, 1), (0, 5, 0)])
def test_there_are_no_more_tickets_than_ready_tasks_or_free_slots(ready: int, slots: int, issued: int) -> None:
    there = world(slots=slots)
    there.handle(*(_request(f"run-{n}") for n in range(ready)))
    assert len(there.tickets()) == issued


def test_one_ticket_stands_in_the_queue_although_every_slot_is_taken() -> None:
    there = world()
    there.granted("a")
    there.request("b")
    assert len(there.tickets()) == 1
    there.request("c")
    assert there.tickets() == []


def test_no_ticket_is_issued_to_a_pool_without_live_workers_until_one_comes() -> None:
    there = world()
    there.tick(limits.WORKER_SILENT_S + 1)
    there.request("a")
    assert there.tickets() == []
    there.heartbeat()
    assert len(there.tickets()) == 1


def test_a_durable_task_takes_a_durable_slot_only() -> None:
    there = world()
    there.request("a", "durable")
    assert there.tickets(kind="task") == []
    (ticket,) = there.tickets(kind="durable")
    assert there.claim("any", kind="task") is None
    assert there.claim(ticket, kind="durable") is not None


def test_a_lost_ticket_is_replaced_after_a_while() -> None:
    there = world()
    there.request("a")
    (lost,) = there.tickets()
    there.sent.clear()
    for _ in range(int(limits.TICKET_LOST_S + limits.SWEEP_INTERVAL_S) + 1):
        there.tick()
        if there.tickets():
            break
        there.heartbeat()
    assert len(there.tickets()) == 1
    assert there.shard.state.counters.anomalies["ticket_lost"] == [lost]


def test_a_ticket_that_waits_for_slots_which_others_have_taken_is_not_found_lost() -> None:
    there = world()
    there.request("a")
    for _ in range(int(2 * limits.TICKET_LOST_S)):
        there.tick()
        there.heartbeat(taken=1)
    assert not there.shard.state.counters.anomalies


# --- claims -----------------------------------------------------------------------------------------------------


def test_a_claim_without_a_ready_task_is_answered_with_no_task() -> None:
    assert world().claim("stale") is None


def test_a_claim_is_served_whatever_its_ticket_was_issued_for() -> None:
    there = world()
    there.request("a")
    assert there.claim("a ticket of an earlier owner") is not None
    assert there.claim(there.tickets()[0] if there.tickets() else "the first") is None


def test_a_claim_that_comes_twice_gets_the_same_grant_twice() -> None:
    there = world(slots=5)
    there.handle(_request("a"), _request("b"))
    (ticket, _) = there.tickets()
    first = there.claim(ticket)
    assert first is not None
    assert there.claim(ticket) == first
    assert there.task("b").status == "READY"


def test_two_claims_of_one_ticket_in_one_batch_are_one_grant() -> None:
    there = world(slots=5)
    there.handle(_request("a"), _request("b"))
    (ticket, _) = there.tickets()
    grants = there.handle(claim(ticket), claim(ticket)).of(Grant)
    assert len(grants) == 2
    assert grants[0] == grants[1]


def test_a_claim_for_a_cancelled_task_gets_no_grant() -> None:
    there = world()
    there.request("a")
    (ticket,) = there.tickets()
    there.cancel("a")
    assert there.claim(ticket) is None


@pytest.mark.parametrize("kind", ["task", "durable"])
def test_the_best_task_is_granted_first(kind: SlotKind) -> None:
    flow = FLOW if kind == "task" else DURABLE
    there = world()
    for run_id, priority in (("old", 1), ("urgent", 3), ("new", 1)):
        there.now += 1
        there.request(run_id, flow.name, priority=priority)
    order = []
    for number in range(3):
        grant = there.claim(f"t{number}", kind=kind)
        assert grant is not None
        order.append(grant.lease.partition(".")[0])
        there.finish(grant)
    assert order == ["urgent", "old", "new"]


def test_a_resumed_task_goes_before_new_ones_of_higher_priority() -> None:
    there = ShardHarness(workflow(TaskSpec("task", retries=1)))
    there.hello()
    grant = there.granted("retried")
    there.request("urgent", priority=3)
    sent = there.handle(failed(grant, next=True))
    assert [g.lease for g in sent.of(Grant)] == ["retried.task@2"]


# --- kept tickets -----------------------------------------------------------------------------------------------


def test_a_report_that_asks_for_more_is_answered_with_the_next_task_under_the_same_ticket() -> None:
    there = world()
    grant = there.granted("a")
    there.request("b")
    (following,) = there.finish(grant, next=True).of(Grant)
    assert (following.ticket, following.lease) == (grant.ticket, "b.task@1")
    assert there.tickets() == []


def test_a_report_that_requests_the_next_task_is_answered_with_no_task_if_none_is_ready() -> None:
    there = world()
    grant = there.granted("a")
    assert there.finish(grant, next=True).of(NoTask) == [NoTask(grant.ticket)]


def test_a_report_that_asks_for_nothing_is_not_answered() -> None:
    there = world()
    grant = there.granted("a")
    there.request("b")
    assert not there.finish(grant).of(Grant)


def test_a_chain_runs_on_under_one_ticket() -> None:
    there = ShardHarness(workflow("a", TaskSpec("b", parents=("a",)), TaskSpec("c", parents=("b",))))
    there.hello()
    grant = there.granted("run")
    for following in ("b", "c"):
        (grant,) = there.finish(grant, next=True).of(Grant)
        assert grant.task == following
        assert there.tickets() == []
    there.finish(grant, next=True)
    assert there.run("run").status == "COMPLETED"  # type: ignore[union-attr]


def test_a_retained_ticket_is_acknowledged_after_its_maximum_of_tasks_and_a_new_one_is_issued(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(limits, "TICKET_REUSE_MAX", 3)
    there = world()
    there.handle(*(_request(f"run-{n}") for n in range(5)))
    grant = there.claim(there.tickets()[0])
    standing = there.tickets()
    for _ in range(2):
        assert grant is not None
        (grant,) = there.finish(grant, next=True).of(Grant)
    assert grant is not None
    sent = there.finish(grant, next=True)
    assert sent.of(NoTask) == [NoTask(grant.ticket)]
    assert len(standing) == 1
    assert there.claim(standing[0]) is not None


def test_a_retained_ticket_is_acknowledged_after_its_maximum_time() -> None:
    there = world()
    there.handle(*(_request(f"run-{n}") for n in range(5)))
    grant = there.claim(there.tickets()[0])
    assert grant is not None
    there.tick(1)
    (grant,) = there.finish(grant, next=True).of(Grant)
    there.tick(int(limits.TICKET_REUSED_MAX_S))
    assert there.finish(grant, next=True).of(NoTask) == [NoTask(grant.ticket)]


def test_a_report_that_comes_twice_grants_one_task() -> None:
    there = world()
    grant = there.granted("a")
    there.handle(_request("b"), _request("c"))
    sent = there.handle(finished(grant, next=True), finished(grant, next=True))
    assert [g.lease for g in sent.of(Grant)] == ["b.task@1"]
    assert there.shard.state.counters.stale_reports == 1


def test_the_answer_to_a_report_can_be_asked_for_again_with_a_claim() -> None:
    there = world()
    grant = there.granted("a")
    there.request("b")
    (lost,) = there.finish(grant, next=True).of(Grant)
    assert there.claim(grant.ticket) == lost


def test_an_evicted_task_leaves_its_ticket_to_the_next_task() -> None:
    there = world()
    there.request("a", "durable")
    grant = there.claim(there.tickets(kind="durable")[0], kind="durable")
    assert grant is not None
    there.request("b", "durable")
    (following,) = there.handle(evicted(grant, wait_op("0", sleep()), next=True)).of(Grant)
    assert following.lease == "b.task@1"


def test_a_released_slot_is_free_for_another_task() -> None:
    there = world()
    grant = there.granted("a")
    there.request("b")
    there.handle(SlotReleased(grant.lease))
    other = there.claim("t2")
    assert other is not None
    there.finish(grant)
    there.finish(other)
    assert there.task("a").status == there.task("b").status == "COMPLETED"


def test_a_declined_grant_is_granted_again() -> None:
    there = world()
    grant = there.granted("a")
    there.handle(GrantDeclined(grant.lease, grant.ticket))
    again = there.claim("t2")
    assert again is not None
    assert again.lease == "a.task@2"


# --- tickets that come again ------------------------------------------------------------------------------------


def test_a_ticket_that_comes_to_another_worker_puts_its_holder_in_doubt_and_still_serves() -> None:
    there = world(workers=2)
    grant = there.granted("a", "w1")
    there.request("b")
    sent = there.handle(claim(grant.ticket, "w2", redelivered=True))
    assert sent.of(Ping, Inbox(inbox_of("w1"))) == [Ping()]
    assert [g.lease for g in sent.of(Grant, Inbox(inbox_of("w2")))] == ["b.task@1"]


def test_a_holder_that_answers_keeps_its_lease() -> None:
    there = world(workers=2)
    grant = there.granted("a", "w1")
    there.claim(grant.ticket, "w2", redelivered=True)
    there.heartbeat("w1", grant.lease)
    there.tick(limits.RECLAIM_GRACE_S + 2)
    there.finish(grant, "done")
    assert there.task("a").output == '"done"'


def test_a_holder_that_does_not_answer_in_time_loses_its_leases() -> None:
    there = world(workers=2)
    grant = there.granted("a", "w1")
    there.claim(grant.ticket, "w2", redelivered=True)
    there.tick(limits.RECLAIM_GRACE_S)
    assert there.task("a").status == "RUNNING"
    there.tick(2)
    assert there.task("a").status == "READY"
    assert there.task("a").losses == 1
    there.finish(grant, "too late")
    assert there.task("a").status == "READY"


def test_the_lease_under_a_ticket_that_moved_on_ends_without_harm_to_the_new_one() -> None:
    there = world(workers=2)
    first = there.granted("a", "w1")
    there.request("b")
    second = there.claim(first.ticket, "w2", redelivered=True)
    assert second is not None
    there.finish(first)
    assert there.claim(second.ticket, "w2", redelivered=True) == second
    there.finish(second)
    assert there.task("b").status == "COMPLETED"


def test_a_worker_whose_ticket_is_redelivered_gets_the_lost_grant() -> None:
    there = world()
    missed = there.granted("a")
    there.request("b")
    assert there.claim(missed.ticket, redelivered=True) == missed


def test_a_worker_that_runs_on_and_has_its_own_ticket_again_can_use_it_for_another_task() -> None:
    there = world(slots=2)
    running = there.granted("a")
    there.heartbeat("w1", running.lease, slots=2)
    there.request("b")
    other = there.claim(running.ticket, redelivered=True)
    assert other is not None
    assert other.lease == "b.task@1"
    assert there.claim(running.ticket, redelivered=True) == other
    there.finish(running)
    there.finish(other)
    assert there.task("a").status == there.task("b").status == "COMPLETED"


# --- who gets nothing -------------------------------------------------------------------------------------------


def test_a_worker_that_is_leaving_gets_nothing() -> None:
    there = world()
    grant = there.granted("a")
    there.request("b")
    there.heartbeat("w1", grant.lease, draining=True)
    assert there.claim("t2") is None
    assert not there.finish(grant, next=True).of(Grant)
    assert there.task("b").status == "READY"


def test_a_claim_of_an_unknown_worker_is_served_and_its_registration_is_requested() -> None:
    there = world()
    there.request("a")
    sent = there.handle(claim("t2", "stranger", pool="other"))
    assert sent.of(Ping, Inbox(inbox_of("stranger"))) == [Ping(hello=True)]
    sent = there.handle(claim("t3", "w2"))
    assert sent.of(Ping) == [Ping(hello=False)]
    assert len(sent.of(Grant)) == 1


def test_a_revoked_lease_frees_its_slot_at_once() -> None:
    there = world()
    grant = there.granted("a")
    sent = there.cancel("a")
    assert sent.of(Revoked) == [Revoked(grant.lease, "cancelled")]
    there.request("b")
    assert len(there.tickets()) == 1


def _request(run_id: str) -> RunRequest:
    return RunRequest(run_id, "flow")


# --- tickets that are kept although nothing is ready ---------------------------------------------------------------


def test_an_idle_ticket_is_retained_and_the_next_run_is_granted_with_its_creation() -> None:
    there = world(slots=4)
    grant = there.granted("a")
    there.finish(grant, next=True)
    assert not there.sent.of(NoTask)
    sent = there.request("b")
    assert [each.lease for each in sent.of(Grant)] == ["b.task@1"]
    assert not sent.of(Ticket)
    assert there.task("b").invocation == 1


def test_an_idle_ticket_is_let_go_after_a_moment() -> None:
    there = world(slots=4)
    grant = there.granted("a")
    there.finish(grant, next=True)
    assert there.tick(limits.TICKET_RETAINED_S + limits.TICK_INTERVAL_S).of(NoTask) == [NoTask(grant.ticket)]
    assert not there.request("b").of(Grant)


def test_tickets_for_at_most_half_of_a_pool_are_retained() -> None:
    there = world(slots=4)
    grants = [there.granted(name, ticket=f"t{name}") for name in "abcd"]
    for grant in grants:
        there.finish(grant, next=True)
    dismissed = there.tick(limits.TICKET_RETAINED_S + limits.TICK_INTERVAL_S).of(NoTask)
    assert len(dismissed) == 2


def test_a_worker_that_stops_is_told_to_acknowledge_its_retained_tickets() -> None:
    there = world(slots=4)
    grant = there.granted("a")
    there.finish(grant, next=True)
    assert there.heartbeat(draining=True, slots=4).of(NoTask) == [NoTask(grant.ticket)]


def test_an_idle_ticket_of_a_worker_that_died_grants_nothing() -> None:
    there = world(slots=4)
    grant = there.granted("a")
    there.finish(grant, next=True)
    there.goodbye()
    assert not there.request("b").of(Grant)
    assert there.task("b").status == "READY"
