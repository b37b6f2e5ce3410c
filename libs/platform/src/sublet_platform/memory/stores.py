"""The stores over one `MemoryDatabase`. They pass the same contract tests as those in MongoDB."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence

from sublet_engine.run.state import LogRecord, Run, TaskRun
from sublet_platform.memory.database import MemoryDatabase
from sublet_platform.mongo.run_documents import metadata_tags, waiting_reasons
from sublet_platform.ports import (
    GONE_WORKER_RETENTION_S,
    Clock,
    RevisionConflict,
    RunChange,
    RunFilter,
    StoredEvent,
    StoredSubscription,
    StoredTimer,
    TriggerRecord,
    WorkerRecord,
    WorkflowRecord,
)
from sublet_protocol import ids
from sublet_protocol.specs import WorkflowSpec

_LIVE_CHUNK = 500


class MemoryRunStore:
    """See `ports.RunStore`."""

    def __init__(self, database: MemoryDatabase, clock: Clock) -> None:
        self._database = database
        self._clock = clock

    async def load_runs(self, run_ids: Sequence[str]) -> list[Run]:
        await self._database.before("load_runs")
        runs = self._database.runs
        found = [runs[run_id] for run_id in dict.fromkeys(run_ids) if run_id in runs]
        await self._database.after("load_runs")
        return found

    async def load_waits(self, run_ids: Sequence[str]) -> Mapping[str, Sequence[TaskRun]]:
        await self._database.before("load_waits")
        runs = self._database.runs
        found = {run_id: [_waits_of(each) for each in runs[run_id].tasks] for run_id in run_ids if run_id in runs}
        await self._database.after("load_waits")
        return found

    async def load_live(self, buckets: Sequence[int]) -> AsyncIterator[list[Run]]:
        await self._database.before("load_live")
        owned = frozenset(buckets)
        live = [run for run in self._database.runs.values() if run.live and ids.bucket_of(run.id) in owned]
        live.sort(key=lambda run: run.created_at)
        await self._database.after("load_live")
        for start in range(0, len(live), _LIVE_CHUNK):
            yield live[start : start + _LIVE_CHUNK]

    async def count_waiting(self, buckets: Sequence[int]) -> Mapping[str, int]:
        await self._database.before("count_waiting")
        owned = frozenset(buckets)
        runs = (run for run in self._database.runs.values() if ids.bucket_of(run.id) in owned)
        counts = Counter(reason for run in runs for reason in waiting_reasons(run))
        await self._database.after("count_waiting")
        return counts

    async def append_log(self, records: Sequence[LogRecord]) -> None:
        await self._database.before("append_log")
        for record in records:
            if record.id not in self._database.log:
                self._database.log[record.id] = record
                self._database.log_of.setdefault(record.task_run_id, []).append(record)
        await self._database.after("append_log")

    async def load_logs(self, task_run_ids: Sequence[str]) -> list[LogRecord]:
        await self._database.before("load_logs")
        records = [each for task in sorted(set(task_run_ids)) for each in self._database.log_of.get(task, ())]
        await self._database.after("load_logs")
        return sorted(records, key=lambda record: (record.task_run_id, record.seq))

    async def commit(self, changes: Sequence[RunChange]) -> None:
        await self._database.before("commit")
        refused = 0
        for change in changes:
            stored = self._database.runs.get(change.after.id)
            expected = change.before.revision if change.before is not None else None
            if (stored.revision if stored is not None else None) == expected:
                self._database.runs[change.after.id] = change.after
            else:
                refused += 1
        await self._database.after("commit")
        if refused:
            raise RevisionConflict(f"{refused} of {len(changes)} runs have another writer")

    async def save_workflow(self, spec: WorkflowSpec, registered_at: float) -> None:
        await self._database.before("save_workflow")
        stored = self._database.workflows.get((spec.name, spec.version))
        if stored is None or stored.registered_at < registered_at:
            self._database.workflows[spec.name, spec.version] = WorkflowRecord(spec, registered_at)
        await self._database.after("save_workflow")

    async def load_workflows(self) -> list[WorkflowRecord]:
        await self._database.before("load_workflows")
        records = sorted(self._database.workflows.values(), key=lambda record: record.registered_at)
        await self._database.after("load_workflows")
        return records

    async def save_worker(self, worker: WorkerRecord) -> None:
        await self._database.before("save_worker")
        self._database.workers[worker.id] = worker
        await self._database.after("save_worker")

    async def load_workers(self) -> list[WorkerRecord]:
        await self._database.before("load_workers")
        since = self._clock.now() - GONE_WORKER_RETENTION_S
        kept = [worker for worker in self._database.workers.values() if not worker.gone or worker.last_seen_at > since]
        await self._database.after("load_workers")
        return sorted(kept, key=lambda worker: (worker.started_at, worker.id))

    async def beat(self, scheduler: str, now: float) -> Mapping[str, float]:
        await self._database.before("beat")
        self._database.schedulers[scheduler] = now
        heard = {each: at for each, at in self._database.schedulers.items() if at > now - 60.0}
        await self._database.after("beat")
        return heard

    async def list_runs(self, query: RunFilter) -> list[Run]:
        await self._database.before("list_runs")
        found = [run for run in self._database.runs.values() if _fits(run, query)]
        found.sort(key=lambda run: (-run.created_at, run.id))
        await self._database.after("list_runs")
        return found[query.offset : query.offset + query.limit]


def _waits_of(task: TaskRun) -> TaskRun:
    return TaskRun(task.name, task.status, replays=task.replays, met=task.met, open_waits=task.open_waits)


def _fits(run: Run, query: RunFilter) -> bool:
    event_id = run.trigger.event_id if run.trigger is not None else None
    parent = run.parent.task_run_id if run.parent is not None else None
    wanted = set(metadata_tags(query.metadata))
    return (
        (query.since is None or run.created_at >= query.since)
        and (query.until is None or run.created_at < query.until)
        and (not query.statuses or run.status in query.statuses)
        and (not query.workflows or run.workflow in query.workflows)
        and (not wanted or wanted <= set(metadata_tags(run.metadata)))
        and (query.parent_task_run_id is None or parent == query.parent_task_run_id)
        and (query.event_id is None or event_id == query.event_id)
    )


class MemorySettingsStore:
    """See `ports.SettingsStore`."""

    def __init__(self, database: MemoryDatabase) -> None:
        self._database = database

    async def claim(self, settings: Mapping[str, int | str]) -> Mapping[str, int | str]:
        await self._database.before("claim_settings")
        if self._database.settings is None:
            self._database.settings = dict(settings)
        stored = dict(self._database.settings)
        await self._database.after("claim_settings")
        return stored


class MemoryTimerStore:
    """See `ports.TimerStore`."""

    def __init__(self, database: MemoryDatabase) -> None:
        self._database = database

    async def change_timers(self, upserts: Sequence[StoredTimer], deletes: Sequence[str]) -> None:
        await self._database.before("change_timers")
        for timer in upserts:
            self._database.timers.setdefault(timer.id, timer)
        for timer_id in deletes:
            self._database.timers.pop(timer_id, None)
        await self._database.after("change_timers")

    async def due_timers(self, until: float, limit: int) -> list[StoredTimer]:
        await self._database.before("due_timers")
        due = sorted(
            (timer for timer in self._database.timers.values() if timer.due <= until), key=lambda timer: timer.due
        )
        await self._database.after("due_timers")
        return due[:limit]

    async def count_timers(self) -> int:
        await self._database.before("count_timers")
        await self._database.after("count_timers")
        return len(self._database.timers)


class MemoryEventStore:
    """See `ports.EventStore`."""

    def __init__(self, database: MemoryDatabase) -> None:
        self._database = database

    async def insert_events(self, events: Sequence[StoredEvent]) -> set[str]:
        await self._database.before("insert_events")
        there_already = set()
        for event in events:
            if event.id in self._database.events:
                there_already.add(event.id)
            else:
                self._database.events[event.id] = event
        await self._database.after("insert_events")
        return there_already

    async def get_events(self, ids: Sequence[str]) -> list[StoredEvent]:
        await self._database.before("get_events")
        events = self._database.events
        found = [events[event_id] for event_id in dict.fromkeys(ids) if event_id in events]
        await self._database.after("get_events")
        return found

    async def last_seq(self) -> int:
        await self._database.before("last_seq")
        newest = max((event.seq for event in self._database.events.values()), default=0)
        passed = self._database.advanced_seq
        await self._database.after("last_seq")
        return max(newest, passed)

    async def advance_past(self, seq: int) -> None:
        await self._database.before("advance_past")
        self._database.advanced_seq = max(self._database.advanced_seq, seq)
        await self._database.after("advance_past")

    async def events_after(self, after: Mapping[str, int], limit: int) -> list[StoredEvent]:
        await self._database.before("events_after")
        later = [e for e in self._database.events.values() if e.key in after and e.seq > after[e.key]]
        await self._database.after("events_after")
        return sorted(later, key=lambda event: event.seq)[:limit]

    async def change_subscriptions(self, upserts: Sequence[StoredSubscription], deletes: Sequence[str]) -> None:
        await self._database.before("change_subscriptions")
        self._database.subscriptions.update((each.id, each) for each in upserts)
        for subscription_id in deletes:
            self._database.subscriptions.pop(subscription_id, None)
        await self._database.after("change_subscriptions")

    async def find_subscriptions(self, match_keys: Sequence[str]) -> list[StoredSubscription]:
        await self._database.before("find_subscriptions")
        wanted = frozenset(match_keys)
        found = [each for each in self._database.subscriptions.values() if each.match_key in wanted]
        await self._database.after("find_subscriptions")
        return found

    async def subscriptions_after(self, subscription_id: str, limit: int) -> list[StoredSubscription]:
        await self._database.before("subscriptions_after")
        later = sorted(each for each in self._database.subscriptions if each > subscription_id)
        found = [self._database.subscriptions[each] for each in later[:limit]]
        await self._database.after("subscriptions_after")
        return found

    async def count_subscriptions(self) -> int:
        await self._database.before("count_subscriptions")
        await self._database.after("count_subscriptions")
        return len(self._database.subscriptions)

    async def save_field_sets(self, field_sets: Mapping[str, Sequence[tuple[str, ...]]]) -> None:
        await self._database.before("save_field_sets")
        for key, added in field_sets.items():
            stored = self._database.field_sets.setdefault(key, [])
            stored += [paths for paths in dict.fromkeys(added) if paths not in stored]
        await self._database.after("save_field_sets")

    async def load_field_sets(self, event_keys: Sequence[str]) -> Mapping[str, Sequence[tuple[str, ...]]]:
        await self._database.before("load_field_sets")
        field_sets = self._database.field_sets
        found = {key: list(field_sets[key]) for key in event_keys if key in field_sets}
        await self._database.after("load_field_sets")
        return found

    async def save_trigger(self, trigger: TriggerRecord, at: float) -> None:
        await self._database.before("save_trigger")
        stored = self._database.triggers.get(trigger.workflow)
        if stored is None or stored[0] <= at:
            self._database.triggers[trigger.workflow] = (at, trigger)
        await self._database.after("save_trigger")

    async def load_triggers(self) -> list[TriggerRecord]:
        await self._database.before("load_triggers")
        records = [record for _, (_, record) in sorted(self._database.triggers.items())]
        await self._database.after("load_triggers")
        return records

    async def list_events(self, key: str | None, since: float | None, limit: int) -> list[StoredEvent]:
        await self._database.before("list_events")
        found = [
            event
            for event in self._database.events.values()
            if (key is None or event.key == key) and (since is None or event.seen_at >= since)
        ]
        await self._database.after("list_events")
        return sorted(found, key=lambda event: -event.seq)[:limit]
