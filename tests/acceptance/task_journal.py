"""What tasks under test really did, written where no crash of theirs can undo it; and gates that hold them up.

Both are files of one directory that a test and its workers share.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from pathlib import Path
from typing import Any

LOOK_INTERVAL_S = 0.02


class TaskJournal:
    """Append-only. An entry is one line, written by one system call: entries of many processes never mix."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._file = directory / "journal.jsonl"

    def write(self, what: str, **facts: Any) -> None:
        line = json.dumps({"what": what, "pid": os.getpid(), **facts}) + "\n"
        descriptor = os.open(self._file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            os.write(descriptor, line.encode())
        finally:
            os.close(descriptor)

    def entries(self, what: str, **facts: Any) -> list[dict[str, Any]]:
        """Those of this kind in which all these facts stand, in the order of writing."""
        return [
            entry
            for entry in self.all()
            if entry["what"] == what and all(entry.get(name) == value for name, value in facts.items())
        ]

    def count(self, what: str, **facts: Any) -> int:
        return len(self.entries(what, **facts))

    def values(self, what: str, fact: str) -> list[Any]:
        """This fact of every entry of the kind."""
        return [entry[fact] for entry in self.entries(what)]

    def all(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self._file.read_text().splitlines()] if self._file.exists() else []

    # --- gates ------------------------------------------------------------------------------------------------

    def open_gate(self, name: str) -> None:
        """Lets everybody pass who waits there or comes later."""
        self._gate(name).touch()

    async def pass_gate(self, name: str) -> None:
        """Works, as far as Sublet can see, until the gate is open."""
        while not self.is_open(name):  # noqa: ASYNC110  # the gate is a file
            await asyncio.sleep(LOOK_INTERVAL_S)

    def pass_gate_blocking(self, name: str) -> None:
        """As `pass_gate`, in a thread."""
        while not self.is_open(name):
            time.sleep(LOOK_INTERVAL_S)

    def is_open(self, name: str) -> bool:
        return self._gate(name).exists()

    def _gate(self, name: str) -> Path:
        return self.directory / f"{name}.open"
