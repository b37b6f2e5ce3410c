"""The worker processes of the demo: started, killed and ended by their process ids."""

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
LEAVE_TIMEOUT_S = 15.0
DIES_WITH_THE_DEMO = ("setpriv", "--pdeathsig", "KILL") if shutil.which("setpriv") else ()
"""Should the demo itself be killed, the kernel ends its workers."""

_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class WorkerFailed(Exception):
    """A worker process did not become ready; the text says what its log ends with."""


@dataclass(frozen=True)
class Job:
    """What a worker process is to run: names of workflows of `demo_workflows`, and how many of their tasks at once."""

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
class Member:
    """A worker process."""

    job: Job
    health_url: str
    log: Path
    process: asyncio.subprocess.Process

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def alive(self) -> bool:
        return self.process.returncode is None


class Crew:
    """All worker processes that were started and not yet ended, by the name of their job."""

    def __init__(self) -> None:
        self.members: dict[str, Member] = {}

    async def hire(self, job: Job) -> None:
        """Start a worker process and wait until it takes work.

        Raises:
            WorkerFailed: it ended, or was not ready in time.
        """
        port = _free_port()
        LOGS.mkdir(parents=True, exist_ok=True)
        log = LOGS / f"demo-{job.name.lower()}.log"
        with log.open("wb") as output:
            process = await asyncio.create_subprocess_exec(
                *DIES_WITH_THE_DEMO,
                Path(sys.executable).with_name("sublet-worker"),
                "demo_workflows:worker",
                env=os.environ | job.settings(port),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,  # Ctrl-C is for the demo, which then ends its workers in good order
            )
        member = self.members[job.name] = Member(job, f"http://127.0.0.1:{port}/health", log, process)
        await _until_ready(member)

    async def kill(self, member: Member) -> None:
        """As ``kill -9`` does it: no warning, no clean-up."""
        member.process.kill()
        await member.process.wait()
        del self.members[member.job.name]

    async def dismiss_all(self) -> None:
        """Ask all to leave, and wait until they have; who does not is killed."""
        for member in self.members.values():
            if member.alive:
                member.process.terminate()
        await asyncio.gather(*(_until_gone(member) for member in self.members.values()))
        self.members.clear()


async def _until_gone(member: Member) -> None:
    try:
        async with asyncio.timeout(LEAVE_TIMEOUT_S):
            await member.process.wait()
    except TimeoutError:
        member.process.kill()
        await member.process.wait()


async def _until_ready(member: Member) -> None:
    try:
        async with asyncio.timeout(READY_TIMEOUT_S):
            while member.alive:
                if await asyncio.to_thread(_is_ready, member.health_url):
                    return
                await asyncio.sleep(0.1)
    except TimeoutError:
        pass
    state = "is not ready" if member.alive else f"ended with status {member.process.returncode}"
    tail = "\n".join(member.log.read_text(errors="replace").splitlines()[-20:])
    raise WorkerFailed(f"Worker {member.job.name} {state}. {member.log} ends with:\n{tail}")


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
