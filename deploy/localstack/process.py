"""A process that outlives the command that started it, known by its pid file."""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from .places import ROOT, LocalError
from .ports import wait_until

LARGEST_LOG = 20_000_000  # bytes; a larger one begins anew with the next start


class ManagedProcess:
    """Started in a session of its own, ended by its id and never by its name."""

    def __init__(self, name: str, directory: Path, log: Path) -> None:
        self.name = name
        self.log = log
        self._pid_file = directory / f"{name}.pid"
        self._child: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int | None:
        """The id of the running process, or None."""
        if self._child is not None and self._child.poll() is not None:
            self._child = None
        try:
            pid, started = self._pid_file.read_text().split()
        except (FileNotFoundError, ValueError):
            return None
        # The kernel reuses ids: the time of its start tells our process from a stranger that has its id now.
        return int(pid) if _identity(int(pid)) == started else None

    def start(self, arguments: Sequence[str], environment: Mapping[str, str]) -> None:
        self._pid_file.parent.mkdir(parents=True, exist_ok=True)
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            if log.tell() > LARGEST_LOG:
                log.truncate(0)
            self._child = subprocess.Popen(
                arguments,
                env=environment,
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._pid_file.write_text(f"{self._child.pid} {_identity(self._child.pid)}\n")

    def wait_until_ready(self, ready: Callable[[], bool], seconds: float) -> None:
        """Waits for a sign of life, and gives up at once if the process ends."""

        def ready_or_dead() -> bool:
            return self.pid is None or ready()

        try:
            wait_until(ready_or_dead, seconds, f"{self.name} did not become ready")
        except LocalError as error:
            raise LocalError(f"{error} {self._last_words()}") from None
        if self.pid is None:
            raise LocalError(f"{self.name} ended while it started. {self._last_words()}")

    def stop(self, grace: float = 20.0) -> None:
        """Asks the process to end, and makes it end when the grace is over."""
        pid = self.pid
        if pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
            deadline = time.monotonic() + grace
            while self.pid is not None and time.monotonic() < deadline:
                time.sleep(0.05)
        self.kill()

    def kill(self) -> None:
        """Ends the process and its children as a power cut would."""
        pid = self.pid
        if pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
            wait_until(lambda: self.pid is None, 10, f"process {pid} ({self.name}) did not end")
        self._pid_file.unlink(missing_ok=True)

    def _last_words(self) -> str:
        lines = self.log.read_text(errors="replace").splitlines()[-15:]
        return "\n".join([f"The end of {self.log}:", *(f"    {line}" for line in lines)])


def _identity(pid: int) -> str:
    """The moment at which a live process started, in the kernel's ticks; empty for one that is not there."""
    try:
        # The second field is the command in parentheses, and may itself hold spaces and parentheses.
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return ""
    threads, started = int(fields[16]), fields[18]
    # A killed program's first thread is a zombie while the others still hold its ports.
    ended = state in "ZX" and threads <= 1
    return "" if ended else started
