"""Queries about runs. Any scheduler answers them from the store.

========== ============================================================ ===========================================
kind       arguments                                                    value
========== ============================================================ ===========================================
run        ``run_id``                                                   `views.run_details`, or null
runs       ``since until statuses workflows metadata                    ``{"rows": [run_details, …]}``, newest first
           parent_task_run_id event_id limit offset``
why        ``run_id``                                                   ``{"text": …, "tasks": {name: text}}``
log        ``task_run_id``                                              `views.durable_log`
workflows                                                               ``{"rows": [{name, version, …}]}``
workers                                                                 ``{"rows": [{id, pool, slots, …}]}``
========== ============================================================ ===========================================
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec

from sublet_engine.run import durable_log
from sublet_engine.run.explain import why
from sublet_platform.dead_letters import Reject
from sublet_platform.ports import Broker, Clock, Delivery, Outgoing, RunFilter, RunStore
from sublet_protocol import ids, limits
from sublet_protocol.messages import MalformedMessage, Query, Reply, decode_queries, encode
from sublet_protocol.topology import INBOXES
from sublet_scheduler import views

logger = logging.getLogger(__name__)


class QueryError(ValueError):
    """The query cannot be answered. The text is the answer to the client."""


class Queries:
    def __init__(self, *, store: RunStore, broker: Broker, clock: Clock, refuse: Reject) -> None:
        self._store, self._broker, self._clock, self._refuse = store, broker, clock, refuse
        self._kinds: dict[str, Callable[[dict[str, Any]], Awaitable[Any]]] = {
            "run": self._run,
            "runs": self._runs,
            "why": self._why,
            "log": self._log,
            "workflows": self._workflows,
            "workers": self._workers,
        }

    async def process(self, deliveries: list[Delivery]) -> None:
        for delivery in deliveries:
            try:
                queries = decode_queries(delivery.body)
            except MalformedMessage as error:
                await self._refuse(delivery, f"not a query: {error}")
                continue
            for query in queries:
                reply = await self._answer(query)
                self._broker.publish_nowait([Outgoing(INBOXES, query.reply_to, encode([reply]), persistent=False)])

    async def _answer(self, query: Query) -> Reply:
        try:
            answer = self._kinds.get(query.kind)
            if answer is None:
                raise QueryError(f"unknown kind of query {query.kind!r}; known are {', '.join(self._kinds)}")
            value = await answer(msgspec.json.decode(query.arguments, type=dict[str, Any]))
        except (QueryError, KeyError, TypeError, msgspec.MsgspecError) as error:
            return Reply(query.correlation_id, error=f"query {query.kind!r}: {error}")
        return Reply(query.correlation_id, value=msgspec.Raw(msgspec.json.encode(value)))

    async def _run(self, arguments: dict[str, Any]) -> Any:
        runs = await self._store.load_runs([ids.run_of(arguments["run_id"])])
        return views.run_details(runs[0]) if runs else None

    async def _runs(self, arguments: dict[str, Any]) -> Any:
        arguments["limit"] = min(int(arguments.get("limit") or 100), limits.BULK_MAX_ITEMS)
        arguments["offset"] = int(arguments.get("offset") or 0)
        given = {key: value for key, value in arguments.items() if value is not None}
        for key in ("statuses", "workflows"):
            if key in given:
                given[key] = tuple(given[key])
        return {"rows": [views.run_details(run) for run in await self._store.list_runs(RunFilter(**given))]}

    async def _why(self, arguments: dict[str, Any]) -> Any:
        runs = await self._store.load_runs([ids.run_of(arguments["run_id"])])
        if not runs:
            raise QueryError(f"there is no run {arguments['run_id']}")
        specs = {(record.spec.name, record.spec.version): record.spec for record in await self._store.load_workflows()}
        workers = [worker for worker in await self._store.load_workers() if not worker.gone]
        pools: dict[str, set[str]] = {}
        for worker in workers:
            if self._clock.now() - worker.last_seen_at <= limits.WORKER_LOST_S:
                for action in worker.actions:
                    pools.setdefault(action, set()).add(worker.pool)
        return why(runs[0], specs.get((runs[0].workflow, runs[0].version)), pools, self._clock.now())

    async def _log(self, arguments: dict[str, Any]) -> Any:
        task_run = arguments["task_run_id"]
        runs = await self._store.load_runs([ids.run_of(task_run)])
        if not runs:
            raise QueryError(f"there is no run {ids.run_of(task_run)}")
        records = await self._store.load_logs([task_run])
        task = runs[0].task(ids.task_of(task_run))
        return views.durable_log(runs[0], task, durable_log.entries_of(durable_log.committed(task, records)))

    async def _workflows(self, arguments: dict[str, Any]) -> Any:
        records = await self._store.load_workflows()
        rows = [{"registered_at": record.registered_at, **msgspec.to_builtins(record.spec)} for record in records]
        return {"rows": rows}

    async def _workers(self, arguments: dict[str, Any]) -> Any:
        return {"rows": [msgspec.to_builtins(worker) for worker in await self._store.load_workers()]}
