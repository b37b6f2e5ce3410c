"""A shard under a storm: messages late, twice and out of order, workers that die, a shard that is dropped between any
two steps. Then the storm ends, and every run must end as well."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from support.shard_system_model import Cluster
from support.worker_model import EVENTS, FLOWS, SLOTS, WorkerModel

PICKS = st.integers(0, 1_000)


class Storm(RuleBasedStateMachine):
    @initialize()
    def begin(self) -> None:
        self.cluster = Cluster()
        self.cluster.start_worker()
        self.cluster.deliver("worker-0")
        self.cluster.commit()

    def worker(self, pick: int) -> WorkerModel:
        workers = list(self.cluster.workers.values())
        return workers[pick % len(workers)]

    def has_workers(self) -> bool:
        return bool(self.cluster.workers)

    # --- the shard ----------------------------------------------------------------------------------------------

    @rule(pick=PICKS, count=st.integers(1, 6))
    def messages_are_handled(self, pick: int, count: int) -> None:
        for number in range(count):
            lanes = sorted(lane for lane, waiting in self.cluster.lanes.items() if waiting)
            if lanes:
                self.cluster.deliver(lanes[(pick + number) % len(lanes)])

    @rule()
    def the_batch_is_committed(self) -> None:
        self.cluster.commit()

    @rule(committed=st.booleans())
    def the_shard_crashes(self, committed: bool) -> None:
        self.cluster.crash(committed=committed)

    @rule()
    def the_shard_goes_to_another_process(self) -> None:
        self.cluster.supersede()

    @precondition(lambda self: self.cluster.superseded is not None)
    @rule(claim=st.booleans())
    def the_process_that_lost_the_shard_goes_on(self, claim: bool) -> None:
        if claim:
            self.cluster.claim_from_superseded()
        else:
            self.cluster.commit_superseded()

    @precondition(lambda self: self.cluster.history)
    @rule(pick=PICKS)
    def a_message_comes_again(self, pick: int) -> None:
        message = self.cluster.history[-1 - pick % min(len(self.cluster.history), 30)]
        self.cluster.lanes["again"].append(message)

    # --- the world ----------------------------------------------------------------------------------------------

    @rule(flow=st.sampled_from([flow.name for flow in FLOWS]))
    def a_run_is_requested(self, flow: str) -> None:
        self.cluster.request(flow)

    @precondition(lambda self: self.cluster.requested)
    @rule(pick=PICKS, replay=st.booleans())
    def a_run_is_cancelled_or_replayed(self, pick: int, replay: bool) -> None:
        run_id = self.cluster.requested[pick % len(self.cluster.requested)]
        (self.cluster.replay if replay else self.cluster.cancel)(run_id)

    @rule(by_s=st.sampled_from([0.5, 1, 2, 4, 4, 12]))
    def time_passes(self, by_s: float) -> None:
        self.cluster.tick(by_s)

    @rule(key=st.sampled_from(EVENTS))
    def an_event_comes(self, key: str) -> None:
        self.cluster.publish_event(key)

    # --- workers ------------------------------------------------------------------------------------------------

    @precondition(lambda self: len(self.cluster.workers) < 3)
    @rule()
    def a_worker_starts(self) -> None:
        self.cluster.start_worker()

    @precondition(has_workers)
    @rule(pick=PICKS)
    def a_worker_says_that_it_lives(self, pick: int) -> None:
        self.cluster.heartbeat(self.worker(pick))

    @precondition(has_workers)
    @rule(pick=PICKS, kind=st.sampled_from(list(SLOTS)))
    def a_worker_gets_a_ticket(self, pick: int, kind: str) -> None:
        self.cluster.give_ticket(self.worker(pick), kind)  # type: ignore[arg-type]

    @precondition(has_workers)
    @rule(pick=PICKS, count=st.integers(1, 5))
    def a_worker_reads_its_inbox(self, pick: int, count: int) -> None:
        for _ in range(count):
            self.cluster.receive(self.worker(pick))

    @precondition(has_workers)
    @rule(pick=PICKS)
    def an_unconfirmed_message_is_lost(self, pick: int) -> None:
        inbox = self.worker(pick).inbox
        if inbox:
            inbox.popleft()

    @precondition(has_workers)
    @rule(pick=PICKS)
    def a_worker_repeats_its_claims(self, pick: int) -> None:
        self.cluster.ask_again(self.worker(pick))

    @precondition(has_workers)
    @rule(pick=PICKS, choice=st.sampled_from(["go on", "go on", "stay", "fail", "release"]), more=st.booleans())
    def code_goes_on(self, pick: int, choice: str, more: bool) -> None:
        self.cluster.act(self.worker(pick), pick, choice, more=more)

    @precondition(has_workers)
    @rule(pick=PICKS, how=st.sampled_from(["blip", "blip", "kill", "drain"]))
    def a_worker_is_in_trouble(self, pick: int, how: str) -> None:
        worker = self.worker(pick)
        {"blip": self.cluster.break_connection, "kill": self.cluster.kill, "drain": self.cluster.drain}[how](worker)

    # --- calm ---------------------------------------------------------------------------------------------------

    def teardown(self) -> None:
        if not hasattr(self, "cluster"):
            return
        self.cluster.settle()
        for run_id in self.cluster.requested:
            run = self.cluster.world.run(run_id)
            assert run is not None, f"the request for {run_id} was lost"
            assert run.status in self.cluster.results[run_id], f"nobody was told how {run_id} ended"
        for queue in self.cluster.world.shard.state.ready:
            assert queue.running == len(queue) == 0


Storm.TestCase.settings = settings(max_examples=60, stateful_step_count=80, deadline=None)
TestStorm = Storm.TestCase
