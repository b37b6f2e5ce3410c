"""The worker processes of the demo: started, killed and stopped by their process ids."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import sys
import urllib.request
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
LOGS = HERE.parents[1] / ".sublet" / "logs"
READY_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 15.0
KILLED_WITH_THE_DEMO = ("setpriv", "--pdeathsig", "KILL") if shutil.which("setpriv") else ()
"""If the demo itself is killed, the kernel kills its workers."""

_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class WorkerFailed(Exception):
    """A worker process did not become ready. The text has the end of its log."""


@dataclass(frozen=True)
class WorkerRole:
    """The configuration of a worker process: its pool, its workflows (names in `demo_workflows`) and its slots."""

    name: str
    pool: str
    workflows: tuple[str, ...]
    slots: int = 0
    durable_slots: int = 0

    def settings(self, port: int) -> dict[str, str]:
        return {
            "PYTHONPATH": str(HERE),
            "SUBLET_DEMO_POOL": self.pool,
            "SUBLET_DEMO_WORKFLOWS": ",".join(self.workflows),
            "SUBLET_DEMO_SLOTS": str(self.slots),
            "SUBLET_DEMO_DURABLE_SLOTS": str(self.durable_slots),
            "SUBLET_HTTP_HOST": "127.0.0.1",
            "SUBLET_HTTP_PORT": str(port),
        }


@dataclass(frozen=True)
class WorkerProcess:
    """A worker process."""

    role: WorkerRole
    health_url: str
    log: Path
    process: asyncio.subprocess.Process

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def alive(self) -> bool:
        return self.process.returncode is None


class WorkerProcesses:
    """The running worker processes, by the name of their role."""

    def __init__(self) -> None:
        self.running: dict[str, WorkerProcess] = {}

    async def start(self, role: WorkerRole) -> None:
        """Start a worker process and wait until it is ready.

        Raises:
            WorkerFailed: it ended, or was not ready in time.
        """
        port = _free_port()
        LOGS.mkdir(parents=True, exist_ok=True)
        log = LOGS / f"demo-{role.name.lower()}.log"
        with log.open("wb") as output:
            process = await asyncio.create_subprocess_exec(
                *KILLED_WITH_THE_DEMO,
                Path(sys.executable).with_name("sublet-worker"),
                "demo_workflows:worker",
                env=os.environ | role.settings(port),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,  # Ctrl-C interrupts the demo only, which then stops its workers gracefully
            )
        worker = self.running[role.name] = WorkerProcess(role, f"http://127.0.0.1:{port}/health", log, process)
        await _wait_until_ready(worker)

    async def kill(self, worker: WorkerProcess) -> None:
        """Kill a worker process as ``kill -9`` does, without warning and clean-up."""
        worker.process.kill()
        await worker.process.wait()
        del self.running[worker.role.name]

    async def stop_all(self) -> None:
        """Stop all worker processes gracefully. Those that do not stop in time are killed."""
        for worker in self.running.values():
            if worker.alive:
                worker.process.terminate()
        await asyncio.gather(*(_wait_until_ended(worker) for worker in self.running.values()))
        self.running.clear()


async def _wait_until_ended(worker: WorkerProcess) -> None:
    try:
        async with asyncio.timeout(STOP_TIMEOUT_S):
            await worker.process.wait()
    except TimeoutError:
        worker.process.kill()
        await worker.process.wait()


async def _wait_until_ready(worker: WorkerProcess) -> None:
    try:
        async with asyncio.timeout(READY_TIMEOUT_S):
            while worker.alive:
                if await asyncio.to_thread(_is_ready, worker.health_url):
                    return
                await asyncio.sleep(0.1)
    except TimeoutError:
        pass
    state = "is not ready" if worker.alive else f"ended with status {worker.process.returncode}"
    tail = "\n".join(worker.log.read_text(errors="replace").splitlines()[-20:])
    raise WorkerFailed(f"Worker {worker.role.name} {state}. {worker.log} ends with:\n{tail}")


def _is_ready(url: str) -> bool:
    try:
        with _DIRECT.open(url, timeout=2) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port
