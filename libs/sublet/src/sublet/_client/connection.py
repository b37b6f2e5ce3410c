"""The connection of a client: sends requests and questions, and waits for their results.

A client has an inbox. Callers that wait for a run are registered by its run id, callers that wait for an answer by a
correlation id. Messages that arrive while the connection is down are lost. So pending results are requested again after
a reconnect, and from time to time during a long wait.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
import uuid
import weakref
from collections import defaultdict
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import Context
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import msgspec

from sublet._amqp.publisher import BatchPublisher
from sublet._amqp.transport import Transport
from sublet._client.config import ClientConfig
from sublet._client.loops import BackgroundLoop, CallersLoop, Loop
from sublet._errors import TransportUnavailable
from sublet._worker.context import offline
from sublet_protocol import messages
from sublet_protocol.backoff import Backoff
from sublet_protocol.messages import Record, Reply, RunRequest, RunResult, WatchRun
from sublet_protocol.raw_json import json_bytes
from sublet_protocol.topology import EVENTS, REQUESTS, client_inbox, run_key

T = TypeVar("T")
TransportFactory = Callable[[ClientConfig], Transport]


RESULT_CHECK_INTERVAL_S = 1.0
"""Seconds between checks which pending results must be requested again."""

WATCH_AGAIN_S = 10.0
"""Seconds without a result after which it is requested again, because messages to an inbox may be lost. The pause
doubles up to `WATCH_AGAIN_MAX_S`."""

WATCH_AGAIN_MAX_S = 60.0
"""Long runs should cost little; a result that was lost is late by this many seconds at most."""

ASK_AGAIN_S = 3.0
"""Seconds without an answer after which a question that may be asked twice is published again."""

_NOT_CONNECTED = "no connection to RabbitMQ: is it running, and is SUBLET_AMQP_URL right? Not connected"
_NO_INBOX = "RabbitMQ has no exchange sublet.inboxes: is a scheduler running (it declares what clients use)? No inbox"

logger = logging.getLogger(__name__)


_forkable: weakref.WeakSet[Connection] = weakref.WeakSet()
_inherited_from_parent: list[object] = []


def _after_fork() -> None:
    # A forked process has no thread of its parent, and must not close the sockets of its parent. So the old objects are
    # kept: they would close their sockets when they are deleted.
    for connection in _forkable:
        _inherited_from_parent.append(vars(connection).copy())
        connection._reset()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


@dataclass(slots=True)
class _Watch:
    """A result that callers wait for."""

    result: asyncio.Future[RunResult]
    ask_at: float
    """Time of the event loop, in seconds."""
    backoff: Backoff = field(default_factory=lambda: Backoff(WATCH_AGAIN_S, WATCH_AGAIN_MAX_S))
    waiting: int = 0
    requested: bool = False
    """RabbitMQ has confirmed the run request, so "no such run" is a valid answer."""


class Connection:
    """All coroutines run on the event loop of the connection: call them through `aio` or `sync`."""

    def __init__(
        self,
        config: ClientConfig,
        transport_factory: TransportFactory,
        *,
        background: bool = True,
        now: Callable[[], float] = time.time,
        new_id: Callable[[], str] = lambda: str(uuid.uuid4()),
    ) -> None:
        self.now = now
        self.new_id = new_id
        self._config = config
        self._transport_factory = transport_factory
        self._background = background
        self._reset()
        _forkable.add(self)

    def _reset(self) -> None:
        """Set the initial state: not connected, no pending results. Also called in a forked process."""
        self._home: Loop = BackgroundLoop(at_exit=self.close) if self._background else CallersLoop()
        self._inbox = client_inbox(self.new_id())
        self._transport: Transport | None = None
        self._connected = SingleFlight(self._connect, self._config.connect_timeout_s, _NOT_CONNECTED)
        self._inbox_open = SingleFlight(self._open_inbox, self._config.connect_timeout_s, _NO_INBOX)
        self._publisher = BatchPublisher(self._publish, drop_cancelled=True)
        self._watches: dict[str, _Watch] = {}
        self._questions: dict[str, asyncio.Future[Reply]] = {}
        self._polling: asyncio.Task[None] | None = None
        self._catching_up: asyncio.Task[None] | None = None

    @contextmanager
    def redirected(
        self,
        home: Loop,
        transport_factory: TransportFactory,
        *,
        now: Callable[[], float],
        new_id: Callable[[], str],
    ) -> Iterator[None]:
        """Use another transport and event loop (``home``) in a ``with`` block, then restore the previous state."""
        before = vars(self).copy()
        self.now, self.new_id, self._transport_factory = now, new_id, transport_factory
        self._reset()
        self._home = home
        try:
            yield
        finally:
            vars(self).update(before)

    # --- callable from any thread or loop --------------------------------------------------------------------------

    async def aio(self, work: Coroutine[Any, Any, T]) -> T:
        """Await a coroutine of this object, on any event loop."""
        _check_online(work)
        return await self._home.run(work)

    def sync(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine of this object. Blocks this thread."""
        _check_online(work)
        return self._home.run_sync(work)

    # --- runs ------------------------------------------------------------------------------------------------------

    async def request(self, requests: Sequence[RunRequest]) -> None:
        """Request runs. Returns when RabbitMQ has confirmed all requests.

        Raises:
            TransportUnavailable: RabbitMQ did not confirm in time. Some of the runs may start.
        """
        await self._send(requests)

    async def run(self, requests: Sequence[RunRequest]) -> list[RunResult]:
        """Like `request`, and wait for the results. They are in the order of the requests."""
        await self._listening()
        run_ids = [request.run_id for request in requests]
        with self._pending_results(run_ids) as watches:
            await self.request([msgspec.structs.replace(request, reply_to=self._inbox) for request in requests])
            for watch in watches:
                watch.requested = True
            return await _all(watches)

    async def results(self, run_ids: Sequence[str]) -> list[RunResult]:
        """Wait for the results of runs that were requested earlier, by any client."""
        await self._listening()
        with self._pending_results(run_ids) as watches:
            for watch in watches:
                watch.requested = True
            await self._ask_for_results(run_ids)
            return await _all(watches)

    # --- questions -------------------------------------------------------------------------------------------------

    async def ask(
        self, question: Callable[[str, str], Record], routing_key: str, what: str, *, repeatable: bool = True
    ) -> bytes | None:
        """Publish ``question(correlation id, inbox)`` and wait for the answer: the JSON of its value, or None.

        Raises:
            ValueError: the answer is an error text.
            TransportUnavailable: there was no answer within ``query_timeout_s``. ``what`` names the question.
        """
        transport = await self._listening()
        correlation_id = self.new_id()
        body = messages.encode([question(correlation_id, self._inbox)])
        answer: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self._questions[correlation_id] = answer
        try:
            async with asyncio.timeout(self._config.query_timeout_s):
                while not answer.done():
                    await transport.publish(REQUESTS, routing_key, body, persistent=not repeatable)
                    await asyncio.wait([answer], timeout=ASK_AGAIN_S if repeatable else None)
        except TimeoutError:
            raise TransportUnavailable(
                f"{what}: no answer within {self._config.query_timeout_s:g} s. Is a scheduler running?"
            ) from None
        finally:
            del self._questions[correlation_id]
        reply = answer.result()
        if reply.error is not None:
            raise ValueError(f"{what}: {reply.error}")
        return json_bytes(reply.value)

    # --- events ----------------------------------------------------------------------------------------------------

    async def push(self, key: str, event_id: str, body: bytes, headers: Mapping[str, object]) -> None:
        """Publish an event. Needs no inbox, so a user who may only write to ``sublet.events`` can do it."""
        transport = await self._connected()
        await transport.publish(EVENTS, key, body, message_id=event_id, headers=headers)

    # --- open and close --------------------------------------------------------------------------------------------

    async def close(self) -> None:
        """Close the connection. Callers that still wait get `TransportUnavailable`. The next call connects again."""
        background: list[asyncio.Task[Any] | None] = [
            self._polling,
            self._catching_up,
            self._connected.forget(),
            self._inbox_open.forget(),
        ]
        for task in background:
            if task is not None:
                task.cancel()
        error = TransportUnavailable("the client was closed")
        waiting: list[asyncio.Future[Any]] = [watch.result for watch in self._watches.values()]
        for future in (*waiting, *self._questions.values()):
            if not future.done():
                future.set_exception(error)
        if self._transport is not None:
            transport, self._transport = self._transport, None
            await transport.close()

    def stop(self) -> None:
        """End the background thread; after `close`."""
        self._home.stop()

    async def _connect(self) -> Transport:
        transport = self._transport_factory(self._config)
        await transport.connect()
        transport.on_reconnect(self._on_reconnect)
        self._transport = transport
        return transport

    async def _listening(self) -> Transport:
        """The connected transport, with an open inbox. One step after the other, so that errors name the failed one."""
        transport = await self._connected()
        await self._inbox_open()
        return transport

    async def _open_inbox(self) -> None:
        transport = await self._connected()
        await transport.open_inbox(self._inbox, self._on_message)

    # --- arriving messages -----------------------------------------------------------------------------------------

    def _on_message(self, body: bytes) -> None:
        try:
            arrived = messages.decode_for_client(body)
        except messages.MalformedMessage as error:
            logger.error("cannot read a message in the inbox, ignoring it: %s", error)
            return
        for record in arrived:
            if isinstance(record, RunResult):
                watch = self._watches.get(record.run_id)
                if watch is not None and not watch.result.done() and (record.status is not None or watch.requested):
                    watch.result.set_result(record)
            else:
                answer = self._questions.get(record.correlation_id)
                if answer is not None and not answer.done():
                    answer.set_result(record)

    def _on_reconnect(self) -> None:
        for watch in self._watches.values():
            watch.ask_at = 0.0
        if self._watches:
            self._catching_up = asyncio.create_task(self._ask_for_due_results())

    # --- pending results -------------------------------------------------------------------------------------------

    @contextmanager
    def _pending_results(self, run_ids: Sequence[str]) -> Iterator[list[_Watch]]:
        loop = asyncio.get_running_loop()
        watches = []
        for run_id in run_ids:
            watch = self._watches.get(run_id)
            if watch is None:
                watch = self._watches[run_id] = _Watch(loop.create_future(), ask_at=loop.time() + WATCH_AGAIN_S)
            watch.waiting += 1
            watches.append(watch)
        if self._polling is None or self._polling.done():
            # An empty context: the task outlives its first caller, and must not count as the code of a user's task.
            self._polling = asyncio.create_task(self._poll_loop(), context=Context())
        try:
            yield watches
        finally:
            for run_id, watch in zip(run_ids, watches, strict=True):
                watch.waiting -= 1
                if not watch.waiting and self._watches.get(run_id) is watch:
                    del self._watches[run_id]

    async def _poll_loop(self) -> None:
        while self._watches:
            await asyncio.sleep(RESULT_CHECK_INTERVAL_S)
            await self._ask_for_due_results()

    async def _ask_for_due_results(self) -> None:
        now = asyncio.get_running_loop().time()
        due = [
            (run_id, watch)
            for run_id, watch in self._watches.items()
            if watch.requested and watch.ask_at <= now and not watch.result.done()
        ]
        for _, watch in due:
            watch.ask_at = now + watch.backoff.next_s()
        try:
            await self._ask_for_results([run_id for run_id, _ in due])
        except TransportUnavailable as error:
            logger.warning("cannot request %d pending results, trying again: %s", len(due), error)

    async def _ask_for_results(self, run_ids: Iterable[str]) -> None:
        wanted = [WatchRun(run_id=run_id, reply_to=self._inbox) for run_id in dict.fromkeys(run_ids)]
        await self._send(wanted)

    async def _send(self, records: Sequence[RunRequest] | Sequence[WatchRun]) -> None:
        await self._connected()
        by_key: dict[str, list[bytes]] = defaultdict(list)
        for record in records:
            by_key[run_key(record.run_id)].append(messages.encode_one(record))
        sending = [self._publisher.send(key, encoded) for key, encoded in by_key.items()]
        if len(sending) == 1:
            await sending[0]
        else:
            await asyncio.gather(*sending)

    async def _publish(self, routing_key: str, body: bytes) -> None:
        transport = await self._connected()
        await transport.publish(REQUESTS, routing_key, body)


def _check_online(work: Coroutine[Any, Any, Any]) -> None:
    """Raise RuntimeError in code that must not use the client (see `context.offline`)."""
    reason = offline.get()
    if reason is not None:
        work.close()
        raise RuntimeError(reason)


async def _all(watches: Sequence[_Watch]) -> list[RunResult]:
    return [await asyncio.shield(watch.result) for watch in watches]


class SingleFlight(Generic[T]):
    """Runs a step once for all callers that need it. The step continues when a caller is cancelled.

    After a failure the next caller runs the step again. ``problem`` is the text of the error when a caller has waited
    for ``timeout_s`` seconds.
    """

    def __init__(self, step: Callable[[], Coroutine[Any, Any, T]], timeout_s: float, problem: str) -> None:
        self._step = step
        self._timeout_s = timeout_s
        self._problem = problem
        self._task: asyncio.Task[T] | None = None

    async def __call__(self) -> T:
        task = self._task
        if task is None or (task.done() and (task.cancelled() or task.exception() is not None)):
            task = self._task = asyncio.create_task(self._step())
        if task.done():
            return task.result()
        try:
            async with asyncio.timeout(self._timeout_s):
                return await asyncio.shield(task)
        except TimeoutError:
            raise TransportUnavailable(f"{self._problem} within {self._timeout_s:g} s") from None

    def forget(self) -> asyncio.Task[T] | None:
        """Make the next caller run the step again. Returns the current step, which may still run."""
        task, self._task = self._task, None
        return task
