"""``client.runs``: reads, cancels and replays runs."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from typing import Any

import msgspec

from sublet._client.connection import Connection
from sublet._client.read_models import (
    TaskRunDetail,
    WorkflowRunDetail,
    WorkflowRunDetails,
    WorkflowRunList,
    WorkflowRunSummary,
)
from sublet._client.refs import WorkflowRunRef
from sublet._declare.types import BulkCancelReplayOpts, RunStatus
from sublet._errors import RunNotFoundError
from sublet_protocol import ids
from sublet_protocol.messages import CancelRun, Query, Record, ReplayRun
from sublet_protocol.topology import QUERY_KEY, run_key

PAGE_SIZE = 500
"""Runs in one page of the query by which a bulk operation finds its runs."""

LIST_DEFAULT_LIMIT = 100
"""Number of runs that `RunsClient.list` returns at most, if no limit is given."""

LIST_DEFAULT_PERIOD = timedelta(days=1)
"""`RunsClient.list` returns runs of this last period, if no start is given."""

NOT_FOUND_PAUSES_S = (0.05, 0.1, 0.2, 0.4, 0.8, 0.0)
"""Seconds after each unsuccessful query for a run: a run that was requested a moment ago may not be stored yet."""


class RunsClient:
    """Reads, cancels and replays runs. Each method ``x()`` blocks this thread; ``await aio_x()`` does not."""

    def __init__(self, connection: Connection, apply_namespace: Callable[[str], str]) -> None:
        self._connection = connection
        self._apply_namespace = apply_namespace

    # --- reading --------------------------------------------------------------------------------------------------

    def get(self, workflow_run_id: str) -> WorkflowRunDetails:
        """The run and its tasks.

        Raises:
            RunNotFoundError: there is no such run.
            TransportUnavailable: no scheduler answered within ``query_timeout_s``.
        """
        return self._connection.sync(self._get(workflow_run_id))

    async def aio_get(self, workflow_run_id: str) -> WorkflowRunDetails:
        """Like `get`, for async code."""
        return await self._connection.aio(self._get(workflow_run_id))

    def get_details(self, external_id: str) -> WorkflowRunDetail:
        """The run with its tasks by name. Exceptions are those of `get`."""
        return _by_name(self.get(external_id))

    async def aio_get_details(self, external_id: str) -> WorkflowRunDetail:
        """Like `get_details`, for async code."""
        return _by_name(await self.aio_get(external_id))

    def get_status(self, workflow_run_id: str) -> RunStatus:
        """The status of the run. Exceptions are those of `get`."""
        return self.get(workflow_run_id).run.status

    async def aio_get_status(self, workflow_run_id: str) -> RunStatus:
        """Like `get_status`, for async code."""
        return (await self.aio_get(workflow_run_id)).run.status

    def get_result(self, run_id: str) -> dict[str, Any]:
        """Wait until the run has ended. Returns the output of each task by its name.

        Raises:
            FailedTaskRunExceptionGroup, RunCancelledError, RunNotFoundError: see ``WorkflowRunRef.result``.
        """
        return self.get_run_ref(run_id).result()

    async def aio_get_result(self, run_id: str) -> dict[str, Any]:
        """Like `get_result`, for async code."""
        return await self.get_run_ref(run_id).aio_result()

    def get_run_ref(self, workflow_run_id: str) -> WorkflowRunRef:
        """A handle of the run, to wait for its result. Does not check that the run exists."""
        return WorkflowRunRef(self._connection, workflow_run_id)

    def list(
        self,
        since: datetime | None = None,
        offset: int | None = None,
        limit: int | None = None,
        statuses: Sequence[RunStatus] | None = None,
        until: datetime | None = None,
        additional_metadata: dict[str, Any] | None = None,
        workflow_ids: Sequence[str] | None = None,
        parent_task_external_id: str | None = None,
        triggering_event_external_id: str | None = None,
    ) -> WorkflowRunList:
        """List runs, newest first. Only runs that match all given arguments are returned.

        Args:
            since: created at or after this time. None: in the last 24 hours. A time without zone is local time.
            offset: how many runs are left out at the start.
            limit: how many runs are returned at most. None: 100.
            statuses: runs in one of these states.
            until: created before this time. None: until now.
            additional_metadata: runs whose metadata contain all of these entries.
            workflow_ids: runs of these workflows, by name without namespace.
            parent_task_external_id: runs that were started by the task run with this id.
            triggering_event_external_id: runs that were started by the event with this id.

        Raises:
            TransportUnavailable: no scheduler answered within ``query_timeout_s``.
        """
        return self._connection.sync(
            self._list(
                since,
                offset,
                limit,
                statuses,
                until,
                additional_metadata,
                workflow_ids,
                parent_task_external_id,
                triggering_event_external_id,
            )
        )

    async def aio_list(
        self,
        since: datetime | None = None,
        offset: int | None = None,
        limit: int | None = None,
        statuses: Sequence[RunStatus] | None = None,
        until: datetime | None = None,
        additional_metadata: dict[str, Any] | None = None,
        workflow_ids: Sequence[str] | None = None,
        parent_task_external_id: str | None = None,
        triggering_event_external_id: str | None = None,
    ) -> WorkflowRunList:
        """Like `list`, for async code."""
        return await self._connection.aio(
            self._list(
                since,
                offset,
                limit,
                statuses,
                until,
                additional_metadata,
                workflow_ids,
                parent_task_external_id,
                triggering_event_external_id,
            )
        )

    # --- changing -------------------------------------------------------------------------------------------------

    def cancel(self, run_id: str) -> None:
        """Cancel a run, or one task by its task run id. A run or task that has ended is not changed.

        Raises:
            ValueError: there is no such run.
            TransportUnavailable: no scheduler answered within ``query_timeout_s``.
        """
        self._connection.sync(self._cancel(run_id))

    async def aio_cancel(self, run_id: str) -> None:
        """Like `cancel`, for async code."""
        await self._connection.aio(self._cancel(run_id))

    def bulk_cancel(self, opts: BulkCancelReplayOpts) -> None:
        """Cancel many runs: by their ids, or all that a filter finds.

        Raises:
            The same exceptions as `cancel`: the first one, after all runs have been tried.
        """
        self._connection.sync(self._bulk_cancel(opts))

    async def aio_bulk_cancel(self, opts: BulkCancelReplayOpts) -> None:
        """Like `bulk_cancel`, for async code."""
        await self._connection.aio(self._bulk_cancel(opts))

    def replay(self, run_id: str) -> None:
        """Run an ended run again, under the same id.

        Tasks that failed or were cancelled run again, and all tasks that depend on them. All tasks of a completed run
        run again.

        Raises:
            ValueError: there is no such run, or it has not ended.
            TransportUnavailable: no scheduler answered within ``query_timeout_s``. The run may still be replayed.
        """
        self._connection.sync(self._replay(run_id))

    async def aio_replay(self, run_id: str) -> None:
        """Like `replay`, for async code."""
        await self._connection.aio(self._replay(run_id))

    # --- inside: on the connection's loop -------------------------------------------------------------------------

    async def _query(self, kind: str, arguments: dict[str, Any], what: str) -> Any:
        def question(correlation_id: str, inbox: str) -> Record:
            return Query(
                correlation_id=correlation_id,
                reply_to=inbox,
                kind=kind,
                arguments=msgspec.Raw(msgspec.json.encode(arguments)),
            )

        raw = await self._connection.ask(question, QUERY_KEY, what)
        return None if raw is None else msgspec.json.decode(raw)

    async def _get(self, run_id: str) -> WorkflowRunDetails:
        run_id = ids.run_of(run_id)
        for pause_s in NOT_FOUND_PAUSES_S:
            answer = await self._query("run", {"run_id": run_id}, f"looking up run {run_id}")
            if answer is not None:
                return WorkflowRunDetails.from_wire(answer)
            await asyncio.sleep(pause_s)
        raise RunNotFoundError(f"There is no run {run_id}.")

    async def _list(
        self,
        since: datetime | None,
        offset: int | None,
        limit: int | None,
        statuses: Sequence[RunStatus] | None,
        until: datetime | None,
        metadata: dict[str, Any] | None,
        workflows: Sequence[str] | None,
        parent_task_run_id: str | None,
        event_id: str | None,
    ) -> WorkflowRunList:
        since_s = since.timestamp() if since else self._connection.now() - LIST_DEFAULT_PERIOD.total_seconds()
        arguments = {
            "since": since_s,
            "until": until.timestamp() if until else None,
            "statuses": [str(status) for status in statuses or ()],
            "workflows": [self._apply_namespace(name) for name in workflows or ()],
            "metadata": metadata or {},
            "parent_task_run_id": parent_task_run_id,
            "event_id": event_id,
            "limit": limit or LIST_DEFAULT_LIMIT,
            "offset": offset or 0,
        }
        answer = await self._query("runs", {k: v for k, v in arguments.items() if v is not None}, "listing runs")
        return WorkflowRunList(rows=[WorkflowRunSummary.from_wire(row) for row in answer["rows"]])

    async def _cancel(self, run_or_task_run_id: str) -> None:
        run_id = ids.run_of(run_or_task_run_id)
        task_run_id = run_or_task_run_id if run_or_task_run_id != run_id else None

        def question(correlation_id: str, inbox: str) -> Record:
            return CancelRun(run_id=run_id, task_run_id=task_run_id, reply_to=inbox, correlation_id=correlation_id)

        await self._connection.ask(question, run_key(run_id), f"cancelling {run_or_task_run_id}")

    async def _bulk_cancel(self, opts: BulkCancelReplayOpts) -> None:
        run_ids = opts.ids if opts.ids is not None else await self._find_ids(opts)
        outcomes = await asyncio.gather(*(self._cancel(run_id) for run_id in run_ids), return_exceptions=True)
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise outcome

    async def _find_ids(self, opts: BulkCancelReplayOpts) -> Sequence[str]:
        filters = opts.filters
        assert filters is not None  # checked by BulkCancelReplayOpts
        found: dict[str, None] = {}
        while True:
            page = await self._list(
                filters.since,
                len(found),
                PAGE_SIZE,
                filters.statuses,
                filters.until,
                filters.additional_metadata,
                filters.workflow_ids,
                None,
                None,
            )
            found.update((row.metadata.id, None) for row in page.rows)
            if len(page.rows) < PAGE_SIZE:
                return list(found)

    async def _replay(self, run_or_task_run_id: str) -> None:
        run_id = ids.run_of(run_or_task_run_id)

        def question(correlation_id: str, inbox: str) -> Record:
            return ReplayRun(run_id=run_id, reply_to=inbox, correlation_id=correlation_id)

        await self._connection.ask(question, run_key(run_id), f"replaying run {run_id}", repeatable=False)


def _by_name(details: WorkflowRunDetails) -> WorkflowRunDetail:
    run = details.run
    return WorkflowRunDetail(
        external_id=run.metadata.id,
        status=run.status,
        input=run.input,
        additional_metadata=run.additional_metadata,
        task_runs={
            task.display_name: TaskRunDetail(
                external_id=task.task_external_id,
                readable_id=task.display_name,
                output=task.output,
                error=task.error_message,
                status=task.status,
                is_evicted=task.is_evicted,
            )
            for task in details.tasks
        },
        done=run.status in (RunStatus.COMPLETED, RunStatus.FAILED, RunStatus.CANCELLED),
    )
