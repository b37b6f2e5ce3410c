"""Task bodies: they run the small programs in their inputs, and record what they observe.

A program is a list of steps, each a JSON list of a verb and its arguments; see `_Machine`. A step that contains
programs runs each of them in an asyncio task.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import Any

from simulation.checkers.history import Body, History, Slept
from simulation.system.processes import ProcessLoop
from sublet import SleepCondition, TaskRunError, UserEventCondition, or_

Program = list[list[Any]]

LOOKBACK_WINDOW = timedelta(seconds=5)

RECORDED = ("sleep", "event", "wait", "child", "shared", "children", "whim")
"""When one of these has answered, the values that `do_now` and `do_memo` gave before it are recorded too. (Until then
they may be lost with the lease, and a replay may get others.)"""


class Planned(Exception):
    """A failure that is part of the program."""


class Bodies:
    """The functions of the tasks of one process. ``workflows``: by name, for children."""

    def __init__(self, history: History, workflows: dict[str, Any]) -> None:
        self._history = history
        self._workflows = workflows

    async def ordinary(self, input: dict[str, Any], ctx: Any) -> dict[str, Any]:
        return await self._run(input["steps"], ctx, durable=False)

    async def durable(self, input: dict[str, Any], ctx: Any) -> dict[str, Any]:
        return await self._run(input["steps"], ctx, durable=True)

    def fixed(self, steps: Program, durable: bool) -> Callable[[dict[str, Any], Any], Awaitable[dict[str, Any]]]:
        """A body with a fixed program that ignores its input: for a task of a DAG."""

        async def body(input: dict[str, Any], ctx: Any) -> dict[str, Any]:
            return await self._run(steps, ctx, durable=durable)

        return body

    async def _run(self, steps: Program, ctx: Any, *, durable: bool) -> dict[str, Any]:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, ProcessLoop)
        assert loop.process is not None
        body = self._history.begin(ctx.task_run_id, ctx._grant.lease, loop.process, durable)
        machine = _Machine(self._history, self._workflows, body, ctx)
        try:
            answers = await machine.run(steps, "")
            output = {"token": body.token, "n": len(steps), "answers": answers}
            self._history.returned(body, output)
            return output
        finally:
            body.ended = True


class _Machine:
    """Runs programs. Every verb is a method with the name ``do_<verb>``."""

    def __init__(self, history: History, workflows: dict[str, Any], body: Body, ctx: Any) -> None:
        self._history = history
        self._workflows = workflows
        self._body = body
        self._ctx = ctx

    async def run(self, steps: Program, prefix: str) -> list[Any]:
        answers = []
        unrecorded: list[tuple[str, Any, Any]] = []
        for number, step in enumerate(steps):
            verb, *arguments = step
            here = f"{prefix}/{number}"
            answer = await getattr(self, f"do_{verb}")(here, *arguments)
            answers.append(answer)
            if verb in ("now", "memo"):
                unrecorded.append((here, step, answer))
            elif verb in RECORDED:
                for entry in unrecorded:
                    self._answered(*entry)
                unrecorded.clear()
        return answers

    def _answered(self, here: str, step: Any, answer: Any) -> Any:
        self._history.answered(self._body, here, step, answer)
        return answer

    async def _waiting(self, operation: Awaitable[Any]) -> Any:
        """Count a branch that waits in a durable operation or joins others. If all branches wait, no slot is needed."""
        self._body.waits += 1
        try:
            return await operation
        finally:
            self._body.waits -= 1

    # --- ordinary steps -----------------------------------------------------------------------------------------

    async def do_work(self, here: str, seconds: float) -> None:
        await asyncio.sleep(seconds)

    async def do_fail(self, here: str, times: int) -> None:
        if self._ctx.retry_count < times:
            raise Planned(f"{here} fails {times} times")

    async def do_release(self, here: str) -> None:
        await self._ctx.aio_release_slot()
        self._body.released = True

    async def do_refresh(self, here: str, seconds: float) -> None:
        await self._ctx.aio_refresh_timeout(timedelta(seconds=seconds))

    async def do_cancel(self, here: str) -> None:
        await self._ctx.aio_cancel()

    async def do_start(self, here: str, workflow: str, steps: Program) -> str:
        """Start a child without waiting for it."""
        ref = await self._workflows[workflow].aio_run({"steps": steps}, wait_for_result=False)
        return str(self._answered(here, ["start", workflow], ref.workflow_run_id))

    # --- durable steps ------------------------------------------------------------------------------------------

    async def do_sleep(self, here: str, seconds: float) -> None:
        slept = self._history.sleeps.setdefault((self._body.task_run_id, here), Slept(self._history.now(), seconds))
        await self._waiting(self._ctx.aio_sleep_for(timedelta(seconds=seconds)))
        if slept.ended_s is None and not self._body.process.gone:
            slept.ended_s = self._history.now()

    async def do_event(self, here: str, key: str, expression: str | None, scope: str | None) -> Any:
        """With a scope, also look back over some time before the wait."""
        lookback_window = None if scope is None else LOOKBACK_WINDOW
        payload = await self._waiting(
            self._ctx.aio_wait_for_event(key, expression, scope=scope, lookback_window=lookback_window)
        )
        return self._answered(here, ["event", key, expression, scope], payload)

    async def do_wait(self, here: str, groups: list[list[list[Any]]]) -> Any:
        """Or-groups of ``["sleep", seconds]`` and ``["event", key, expression, scope]``."""
        alternatives = []
        for g, group in enumerate(groups):
            conditions = [_condition(spec, f"{g}.{c}") for c, spec in enumerate(group)]
            alternatives.append(or_(*conditions) if len(conditions) > 1 else conditions[0])
        result = await self._waiting(self._ctx.aio_wait_for(f"wait {here}", *alternatives))
        return self._answered(here, ["wait", groups], result)

    async def do_memo(self, here: str) -> int:
        value = int(await self._ctx.aio_memo(self._history.mint, int))
        self._history.remembered(self._body, here, value)
        return value

    async def do_now(self, here: str) -> str:
        return str((await self._ctx.aio_now()).isoformat())

    async def do_child(self, here: str, workflow: str, steps: Program) -> Any:
        return self._answered(here, ["child", workflow], await self._child(workflow, steps))

    async def do_shared(self, here: str, workflow: str, steps: Program) -> Any:
        """All steps of the task that start this workflow share one child."""
        return self._answered(here, ["shared", workflow], await self._child(workflow, steps, child_key=workflow))

    async def do_children(self, here: str, workflow: str, programs: list[Program]) -> Any:
        child = self._workflows[workflow]
        items = [child.create_bulk_run_item({"steps": steps}) for steps in programs]
        outcomes = await self._waiting(child.aio_run_many(items, return_exceptions=True))
        return self._answered(here, ["children", workflow, len(programs)], [_outcome(outcome) for outcome in outcomes])

    async def _child(self, workflow: str, steps: Program, child_key: str | None = None) -> Any:
        try:
            return await self._waiting(self._workflows[workflow].aio_run({"steps": steps}, child_key=child_key))
        except TaskRunError as error:
            return _outcome(error)

    async def do_gather(self, here: str, programs: list[Program]) -> Any:
        return await self._waiting(asyncio.gather(*self._branches(here, programs)))

    async def do_group(self, here: str, programs: list[Program]) -> Any:
        async def group() -> list[Any]:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(branch) for branch in self._branches(here, programs)]
            return [task.result() for task in tasks]

        return await self._waiting(group())

    async def do_race(self, here: str, programs: list[Program]) -> Any:
        """The first branch wins; the others are cancelled."""
        tasks = [asyncio.create_task(branch) for branch in self._branches(here, programs)]
        done, pending = await self._waiting(asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED))
        for task in tasks:
            if task in pending:
                task.cancel()
        winner = next(number for number, task in enumerate(tasks) if task in done)
        return self._answered(here, ["race", len(programs)], [winner, tasks[winner].result()])

    async def do_whim(self, here: str) -> None:
        """A non-deterministic step: each invocation sleeps for another time."""
        await self._waiting(self._ctx.aio_sleep_for(timedelta(seconds=1 + self._ctx.invocation_count)))

    def _branches(self, here: str, programs: list[Program]) -> list[Any]:
        return [self._branch(steps, f"{here}.{number}") for number, steps in enumerate(programs)]

    async def _branch(self, steps: Program, prefix: str) -> list[Any]:
        self._body.branches += 1
        try:
            return await self.run(steps, prefix)
        finally:
            self._body.branches -= 1


def _condition(spec: list[Any], key: str) -> Any:
    if spec[0] == "sleep":
        return SleepCondition(timedelta(seconds=spec[1]), readable_data_key=key)
    return UserEventCondition(spec[1], spec[2], readable_data_key=key, scope=spec[3])


def _outcome(value: Any) -> Any:
    if isinstance(value, TaskRunError):
        return {"failed": value.exc_type}
    return json.loads(json.dumps(value))
