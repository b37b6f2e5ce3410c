"""Worker liveness: registration, heartbeats, lost leases, deadlines and periodic sweeps."""

from __future__ import annotations

import math

from msgspec.structs import replace

from sublet_engine.run import leases, transitions
from sublet_engine.run.state import Run, TaskRun
from sublet_engine.shard.state import ShardState
from sublet_engine.shard.tickets import Tickets
from sublet_engine.shard.unit_of_work import Resend, WorkerChange
from sublet_engine.shard.workers import Worker
from sublet_protocol import ids, limits
from sublet_protocol.destinations import Ingest
from sublet_protocol.messages import Heartbeat, Hello, Ping, RegisterTriggers, Revoked
from sublet_protocol.specs import topological


class Liveness:
    """``first``: this shard also acts for all shards: it registers triggers and saves workers."""

    def __init__(self, state: ShardState, tickets: Tickets, *, first: bool) -> None:
        self._state, self._tickets = state, tickets
        self._first = first
        self._swept_at = self._ticked_at = state.now
        self._fresh_since = math.inf
        """Messages that are handled after this time (Unix seconds) were sent after the last outage: they came after the
        tick that ended it."""
        self._patient_until = state.now + limits.WORKER_SILENT_S

    # --- workers ----------------------------------------------------------------------------------------------

    def on_hello(self, hello: Hello) -> None:
        state = self._state
        for workflow in hello.workflows:
            spec = replace(workflow, tasks=topological(workflow.tasks))
            if state.is_outdated(spec, hello.at):
                continue
            state.load_workflow(spec, hello.at)
            state.unit_of_work.workflows[spec.name, spec.version] = (spec, hello.at)
            if self._first:
                triggers = RegisterTriggers(spec.name, spec.on_events, spec.default_filters, hello.at)
                state.unit_of_work.send(Ingest(), triggers, durable=True)
        worker = state.workers.add(hello.worker, hello.pool, hello.inbox, state.now)
        worker.slots = {"task": hello.slots, "durable": hello.durable_slots}
        worker.name, worker.started_at = hello.name, hello.at
        state.workers.offer(hello.pool, hello.actions, hello.at)
        self._save_worker(worker)
        state.route_again()
        self._tickets.pool_changed(hello.pool)

    def on_heartbeat(self, beat: Heartbeat) -> None:
        state = self._state
        worker = state.workers.get(beat.worker)
        if worker is None:
            worker = state.workers.add(beat.worker, beat.pool, beat.inbox, state.now)
            if not state.workers.known(beat.pool):
                state.send(beat.inbox, Ping(hello=True))
        worker.seen(state.now)
        worker.inbox, worker.draining = beat.inbox, beat.draining
        worker.slots = {"task": beat.slots, "durable": beat.durable_slots}
        worker.taken = {"task": beat.taken, "durable": beat.durable_taken}
        self._tickets.pool_changed(beat.pool)
        if worker.draining:
            self._tickets.dismiss_worker(worker.id)
        if state.now - worker.saved_at > limits.WORKER_SAVE_INTERVAL_S:
            self._save_worker(worker)
        self._compare_leases(worker, {held.lease: held.delivered for held in beat.leases})

    def _compare_leases(self, worker: Worker, held: dict[str, int]) -> None:
        """Compare the leases that the worker lists with those that the shard has granted to it.

        Leases that have ended are revoked. A lease that the worker does not list for too long is lost, because its
        grant never arrived. Results that a resident task has missed are sent again.
        """
        state = self._state
        for lease in held:
            run_id = ids.run_of(lease)
            held_run = state.runs.get(run_id)  # a run of this shard that has a lease is always in memory
            if state.owns(run_id) and (held_run is None or leases.holder(held_run, lease) is None):
                state.send(worker.inbox, Revoked(lease, "superseded"))
        unlisted, worker.unlisted = worker.unlisted, {}
        for task_run in sorted(worker.leases):
            run, task = state.find(task_run)
            lease = ids.lease_id(task_run, task.invocation)
            if lease not in held:
                worker.unlisted[lease] = unlisted.get(lease, state.now)
                if state.now - worker.unlisted[lease] > limits.GRANT_UNSEEN_S:
                    state.counters.anomaly("grant_unseen", lease)
                    self._lose(run, lease)
            elif 0 <= held[lease] < task.completed_count and state.completed_long_ago(task_run):
                state.counters.anomaly("result_unseen", lease)
                state.unit_of_work.resends.append(Resend(worker.inbox, lease, task, held[lease]))
        worker.listed = frozenset(held)

    def on_goodbye(self, worker_id: str) -> None:
        """The worker has stopped, or was silent for too long. It has lost all its leases."""
        state = self._state
        worker = state.workers.get(worker_id)
        if worker is None:
            return
        state.workers.remove(worker.id)
        self._save_worker(worker, gone=True)
        for task_run in sorted(worker.leases):
            run, task = state.find(task_run)
            self._lose(run, ids.lease_id(task_run, task.invocation))
        state.route_again()

    def _lose(self, run: Run, lease: str) -> None:
        state = self._state
        spec = state.workflow_of(run)
        assert spec is not None
        effects = state.effects()
        state.counters.leases_lost += 1
        state.put(run, transitions.worker_lost(run, lease, spec, effects), effects)

    def _save_worker(self, worker: Worker, *, gone: bool = False) -> None:
        if self._first:
            worker.saved_at = self._state.now
            actions = self._state.workers.actions(worker.pool)
            self._state.unit_of_work.workers.append(WorkerChange(worker, actions, gone))

    # --- time -------------------------------------------------------------------------------------------------

    def on_tick(self, at: float) -> None:
        """Time has advanced to ``at`` (Unix seconds).

        Ticks come through the same queue as reports. All messages that arrived before the tick have been handled, so
        a worker or a report never counts as late because this process was slow. After an outage, and right after a
        takeover, no deadline expires for a while: messages that were sent meanwhile are still under way.
        """
        state = self._state
        at = min(at, state.now)
        if at - self._ticked_at > limits.WORKER_SILENT_S:
            self._patient_until = state.now + limits.WORKER_SILENT_S
            self._fresh_since = state.now
            state.workers.reset_silence(state.now)
        self._fresh_since = min(self._fresh_since, state.now)
        self._ticked_at = max(self._ticked_at, at)
        if at >= self._patient_until:
            self._expire_deadlines(at)
        for worker in state.workers.lost(at):
            self.on_goodbye(worker.id)
        self._tickets.dismiss_expired()
        if state.now - self._swept_at >= limits.SWEEP_INTERVAL_S:
            self._swept_at = state.now
            self._sweep()

    def _expire_deadlines(self, at: float) -> None:
        state = self._state
        for run_id, task in state.deadlines.expire(at, self._undecided):
            run = state.runs[run_id]
            spec = state.workflow_of(run)
            assert spec is not None
            effects = state.effects()
            expire = transitions.time_out if task.lease is not None else transitions.schedule_time_out
            state.put(run, expire(run, task, spec, effects), effects)

    def _undecided(self, run_id: str, task: TaskRun, deadline: float) -> bool:
        """True if it is too early to time the task out.

        That is so while the worker has sent no heartbeat since the deadline, except possibly one that an outage
        delayed: it sends one soon, or is lost. It is also so while the worker does not list the lease: then either the
        grant has not arrived and will be found lost, or the report of the end is under way.
        """
        if task.lease is None:
            return False
        worker = self._state.workers.get(task.lease.worker)
        if worker is None or worker.last_seen < deadline or worker.last_seen <= self._fresh_since:
            return True
        return ids.lease_id(ids.task_run_id(run_id, task.name), task.invocation) not in worker.listed

    def _sweep(self) -> None:
        """Repair what no message reported: lost tickets, and ready tasks in the queues of pools without workers."""
        lost = self._tickets.forget_lost()
        if lost:
            self._state.counters.anomaly("ticket_lost", *lost)
        self._state.route_again()
