"""Fault injection: kills, stops, freezes and restarts processes and servers, in an order that a seed decides."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections import Counter
from collections.abc import Awaitable, Callable

from acceptance.environment import Environment
from acceptance.processes import Process
from acceptance.stack import SERVICES, Stack
from chaos.audit import Audit
from chaos.load import WORKFLOWS
from support.servers import MongoServer, RabbitServer

PAUSE_MAX_S = 3.0
"""Maximum time between the end of a process and its restart."""
FREEZES_S = (1.0, 1.0, 4.0, 4.0, 12.0, 12.0, 35.0)
"""From too short to be noticed to so long that the broker closes the connection, or a worker counts as lost."""


class FaultInjector:
    """``history``: the injected faults, in order. The ``audit`` is told of each fault before it happens."""

    def __init__(self, environment: Environment, stack: Stack, audit: Audit, seed: int) -> None:
        self._environment = environment
        self._stack = stack
        self._audit = audit
        self._random = random.Random(seed)
        self._workers: list[Process] = []
        self.history: list[str] = []
        self.counts: Counter[str] = Counter()

    async def begin(self) -> None:
        for _ in range(2):
            self._start_worker()
        for worker in self._workers:
            await asyncio.to_thread(worker.wait_until_ready)
        self._stack.launch("scheduler").wait_until_ready()

    async def inject(self) -> None:
        fault: Callable[[], Awaitable[None]] = self._random.choice(
            [
                *(self._kill_worker, self._stop_worker, self._freeze_worker),
                *(self._kill_service, self._kill_service, self._stop_service, self._freeze_service),
                *(self._kill_server, self._stop_server, self._freeze_server),
            ]
        )
        await fault()

    # --- workers --------------------------------------------------------------------------------------------------

    def _start_worker(self) -> None:
        self._workers.append(self._environment.launch_worker(*WORKFLOWS, slots=4, durable_slots=4))

    async def _kill_worker(self) -> None:
        worker = self._any_worker()
        self._record("kill -9", "worker", worker)
        self._workers.remove(worker)
        worker.kill()
        self._start_worker()

    async def _stop_worker(self) -> None:
        worker = self._any_worker()
        self._record("SIGTERM", "worker", worker)
        self._workers.remove(worker)
        worker.terminate()
        self._start_worker()

    async def _freeze_worker(self) -> None:
        await self._freeze("worker", self._any_worker())

    def _any_worker(self) -> Process:
        return self._random.choice(self._workers)

    # --- services -------------------------------------------------------------------------------------------------

    async def _kill_service(self) -> None:
        service, process = self._any_service()
        self._record("kill -9", service, process)
        process.kill()
        await self._pause()
        process.start()

    async def _stop_service(self) -> None:
        service, process = self._any_service()
        self._record("SIGTERM", service, process)
        process.terminate()
        await asyncio.to_thread(process.wait_for_end)
        await self._pause()
        process.start()

    async def _freeze_service(self) -> None:
        await self._freeze(*self._any_service())

    def _any_service(self) -> tuple[str, Process]:
        service = self._random.choice(SERVICES)
        return service, self._random.choice(self._stack.of(service))

    async def _freeze(self, kind: str, process: Process) -> None:
        self._record("SIGSTOP", kind, process)
        process.pause()
        await asyncio.sleep(self._random.choice(FREEZES_S))
        process.resume()

    # --- servers --------------------------------------------------------------------------------------------------

    async def _kill_server(self) -> None:
        server = self._any_server()
        self._record("kill -9", server.name)
        await asyncio.to_thread(server.kill)
        await self._pause()
        await asyncio.to_thread(server.start)

    async def _stop_server(self) -> None:
        server = self._any_server()
        self._record("SIGTERM", server.name)
        await asyncio.to_thread(server.stop)
        await self._pause()
        await asyncio.to_thread(server.start)

    async def _freeze_server(self) -> None:
        server = self._any_server()
        self._record("SIGSTOP", server.name)
        assert server.pid is not None
        os.kill(server.pid, signal.SIGSTOP)
        await asyncio.sleep(self._random.choice(FREEZES_S))
        os.kill(server.pid, signal.SIGCONT)

    def _any_server(self) -> RabbitServer | MongoServer:
        servers: list[RabbitServer | MongoServer] = [self._stack.rabbit, self._stack.mongo]
        return self._random.choice(servers)

    # --- all ------------------------------------------------------------------------------------------------------

    def _record(self, how: str, kind: str, process: Process | None = None) -> None:
        self.counts[how] += 1
        self.history.append(f"{how} {process.name if process else kind}")
        self._audit.fault_follows(kind, process)

    async def _pause(self) -> None:
        await asyncio.sleep(self._random.uniform(0.0, PAUSE_MAX_S))
