"""Processes that continue after the command that started them, identified by a pid file."""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from .paths import ROOT, LocalError
from .ports import wait_until

LOG_MAX_BYTES = 20_000_000
"""A larger log is truncated at the next start."""


class ManagedProcess:
    """A process in a session of its own. It is stopped by its process id, never by its name."""

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
        # The kernel reuses ids. The start time distinguishes this process from a later one with the same id.
        return int(pid) if _identity(int(pid)) == started else None

    def start(self, arguments: Sequence[str], environment: Mapping[str, str]) -> None:
        self._pid_file.parent.mkdir(parents=True, exist_ok=True)
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            if log.tell() > LOG_MAX_BYTES:
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
        """Wait until the process is ready. Fail at once if it ends."""

        def ready_or_dead() -> bool:
            return self.pid is None or ready()

        try:
            wait_until(ready_or_dead, seconds, f"{self.name} did not become ready")
        except LocalError as error:
            raise LocalError(f"{error} {self._end_of_log()}") from None
        if self.pid is None:
            raise LocalError(f"{self.name} ended during its start. {self._end_of_log()}")

    def stop(self, grace: float = 20.0) -> None:
        """Send SIGTERM. Kill the process if it has not ended after ``grace`` seconds."""
        pid = self.pid
        if pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
            deadline = time.monotonic() + grace
            while self.pid is not None and time.monotonic() < deadline:
                time.sleep(0.05)
        self.kill()

    def kill(self) -> None:
        """Kill the process and its children, as a power failure would."""
        pid = self.pid
        if pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
            wait_until(lambda: self.pid is None, 10, f"process {pid} ({self.name}) did not end")
        self._pid_file.unlink(missing_ok=True)

    def _end_of_log(self) -> str:
        lines = self.log.read_text(errors="replace").splitlines()[-15:]
        return "\n".join([f"The end of {self.log}:", *(f"    {line}" for line in lines)])


def _identity(pid: int) -> str:
    """The start time of a live process, in ticks of the kernel. Empty if there is no such process."""
    try:
        # The second field is the command in parentheses. It may itself contain spaces and parentheses.
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return ""
    threads, started = int(fields[16]), fields[18]
    # The first thread of a killed program is a zombie while its other threads still hold the ports.
    ended = state in "ZX" and threads <= 1
    return "" if ended else started
