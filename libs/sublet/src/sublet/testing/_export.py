"""Exports durable logs from a running system: from production, or from a test environment."""

from __future__ import annotations

from typing import Any

import msgspec

from sublet._client.client import Sublet
from sublet._client.connection import Connection
from sublet._client.refs import TaskRunRef, WorkflowRunRef
from sublet._declare.task import Task
from sublet_protocol import ids
from sublet_protocol.messages import Query
from sublet_protocol.topology import QUERY_KEY

Ref = TaskRunRef[Any, Any] | WorkflowRunRef | str


def export_log(client: Sublet, ref: Ref, task: Task[Any, Any] | str | None = None) -> dict[str, Any]:
    """Export the durable log of a task as a JSON object, for `replay`. Blocks this thread.

    Args:
        client: a client of the system that has the run.
        ref: a handle of the run, the id of the run, or the id of a task run.
        task: the task or its name. Needed if the run has several tasks.

    Raises:
        ValueError: there is no such run or task, or the run has several tasks and none is named.
        TransportUnavailable: no scheduler answered in time.
    """
    return client._connection.sync(_export(client._connection, ref, task))


async def aio_export_log(client: Sublet, ref: Ref, task: Task[Any, Any] | str | None = None) -> dict[str, Any]:
    """Like `export_log`, for async code."""
    return await client._connection.aio(_export(client._connection, ref, task))


async def _export(connection: Connection, ref: Ref, task: Task[Any, Any] | str | None) -> dict[str, Any]:
    run_id = str(ref)
    name = task.name if isinstance(task, Task) else task
    if name is None and not ids.task_of(run_id):
        run = await _ask(connection, "run", {"run_id": run_id})
        if run is None:
            raise ValueError(f"there is no run {run_id}")
        names = [listed["name"] for listed in run["tasks"]]
        if len(names) != 1:
            raise ValueError(f"run {run_id} has the tasks {', '.join(names)}: say whose log it should be")
        name = names[0]
    task_run_id = run_id if name is None else ids.task_run_id(ids.run_of(run_id), name)
    return dict(await _ask(connection, "log", {"task_run_id": task_run_id}))


async def _ask(connection: Connection, kind: str, arguments: dict[str, str]) -> Any:
    raw = msgspec.Raw(msgspec.json.encode(arguments))
    answer = await connection.ask(
        lambda correlation_id, inbox: Query(kind=kind, arguments=raw, reply_to=inbox, correlation_id=correlation_id),
        QUERY_KEY,
        f"the {kind} of {next(iter(arguments.values()))}",
    )
    return None if answer is None else msgspec.json.decode(answer)
