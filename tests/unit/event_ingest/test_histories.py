"""Random histories of events, waits, cut connections and failing stores: no wake-up is lost."""

from __future__ import annotations

import asyncio
import json
import random

from hypothesis import given, settings
from hypothesis import strategies as st

from sublet_platform.ports import StoreUnavailable
from sublet_protocol.messages import Subscribe
from sublet_protocol.specs import EventCondition
from support.ingest_harness import IngestHarness, Instance, wait
from support.virtual_time import in_virtual_time

_EXPRESSIONS = (None, "input.n == 1", "input.n == 2 && input.m > 0", "input.m == 1 || input.n == 3", "input.x > 1")
_actions = st.lists(
    st.one_of(
        st.tuples(st.just("event"), st.integers(0, 3), st.integers(0, 2)),
        st.tuples(st.just("wait"), st.integers(0, len(_EXPRESSIONS) - 1), st.integers(0, 2)),
        st.tuples(st.just("pause"), st.integers(0, 2), st.just(0)),
        st.tuples(st.just("cut"), st.just(0), st.just(0)),
        st.tuples(st.just("restart"), st.just(0), st.just(0)),
    ),
    min_size=1,
    max_size=25,
)
_SCOPES = (None, "s", "t")


@settings(max_examples=150, deadline=None)
@given(_actions, st.integers(0, 2**32))
def test_every_wait_gets_the_earliest_matching_event_despite_faults(
    actions: list[tuple[str, int, int]], seed: int
) -> None:
    _run_history(actions, random.Random(seed))


@in_virtual_time
async def _run_history(actions: list[tuple[str, int, int]], chance: random.Random) -> None:
    harness, instances = await IngestHarness.begin()
    waits: dict[str, Subscribe] = {}

    async def fail_at_random(operation: str) -> None:
        if chance.random() < 0.3:
            await asyncio.sleep(chance.random() * 0.1)
        if chance.random() < 0.1:
            raise StoreUnavailable("no primary")

    harness.database.before = harness.database.after = fail_at_random
    for index, (what, first, second) in enumerate(actions):
        if what == "event":
            scope = _SCOPES[second]
            headers = {} if scope is None else {"scope": scope}
            await harness.publish({"n": first, "m": second}, message_id=f"m{index}", **headers)
        elif what == "wait":
            subscribe = wait(str(index), _EXPRESSIONS[first], scope=_SCOPES[second], since_s=chance.choice([-1, 0, 1]))
            waits[subscribe.task_run_id] = subscribe
            await harness.command(subscribe)
        elif what == "pause":
            await asyncio.sleep(first * 0.3)
        elif what == "cut":
            instances[-1].broker.kill_connection(down_s=chance.random())
        else:
            instances.append(Instance(harness))
            await instances[-1].service.start()
            if chance.random() < 0.5:
                await instances[0].stop()
                del instances[0]
    harness.database.before = harness.database.after = _answer_at_once
    await asyncio.sleep(60)
    _check(harness, waits)
    for instance in instances:
        await instance.stop()


async def _answer_at_once(operation: str) -> None:
    """The database answers at once."""


def _check(harness: IngestHarness, waits: dict[str, Subscribe]) -> None:
    events = sorted(harness.database.events.values(), key=lambda event: event.seq)
    for task_run, subscribe in waits.items():
        condition = subscribe.condition
        assert isinstance(condition, EventCondition)
        matching = [
            event
            for event in events
            if condition.scope in (None, event.scope) and _fits(condition.expression, json.loads(event.payload))
        ]
        matched_ids = [message.event_id for message in harness.matched if message.task_run_id == task_run]
        after = [event.id for event in matching if event.seq > subscribe.since]
        if after:
            assert matched_ids, f"{task_run} was never matched with {after[0]}"
            assert matched_ids[0] == after[0]
        assert set(matched_ids) <= set(after)


def _fits(expression: str | None, payload: dict[str, int]) -> bool:
    n, m = payload["n"], payload["m"]
    return {
        None: True,
        _EXPRESSIONS[1]: n == 1,
        _EXPRESSIONS[2]: n == 2 and m > 0,
        _EXPRESSIONS[3]: m == 1 or n == 3,
        _EXPRESSIONS[4]: False,
    }[expression]
