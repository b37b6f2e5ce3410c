"""The full test: every part of the test matrix that this machine can run, and a report of what ran and what did not."""

import contextlib
import functools
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from .paths import STATE, LocalError, command, say
from .tools import ensure_uv, run

PYTHONS = ("3.11", "3.12", "3.13", "3.14")
"""Versions that Sublet may be used with."""

SEEDS = 20_000
"""Ten times the seeds that `.ci/run` simulates."""


@dataclass(frozen=True)
class Part:
    """A part of the matrix. ``run`` returns an exit status, or raises `NotAvailable`."""

    name: str
    run: Callable[[], int]


class NotAvailable(Exception):
    """The machine cannot run this part. The message says why."""


def run_all(parts: Iterable[Part]) -> int:
    """Run all parts and print a report. The status is 0 if at least one part ran and none failed."""
    report: list[str] = []
    statuses: list[int] = []
    for part in parts:
        say(f"Full test: {part.name}")
        began_at = time.monotonic()
        try:
            statuses.append(part.run())
            result = "passed" if statuses[-1] == 0 else f"FAILED with status {statuses[-1]}"
            report.append(f"{part.name:<32}{result} after {time.monotonic() - began_at:.0f} s")
        except NotAvailable as reason:
            report.append(f"{part.name:<32}not run: {reason}")
    print("Full test:", *report, sep="\n  ", flush=True)
    return 0 if statuses and not any(statuses) else 1


def parts(test: Callable[[], int], simulate: Callable[[int], int], seeds: int) -> list[Part]:
    """The tests on each Python version and event loop, then the simulation.

    ``test`` runs the tests in the current environment, ``simulate`` as many seeds as it is told.
    """
    return [
        *(Part(f"tests on Python {version}", functools.partial(_on, version, test)) for version in PYTHONS),
        Part("tests on the event loop uvloop", _uvloop),
        Part(f"{seeds:,} seeds of the simulation", lambda: simulate(seeds)),
    ]


def _on(version: str, test: Callable[[], int]) -> int:
    if _version_of(command("python")) == version:
        return test()
    python = find_python(version)
    if python is None:
        raise NotAvailable(f"this machine has no Python {version}")
    with _environment(STATE / f"python-{version}"):
        try:
            run([ensure_uv(), "sync", "--frozen", "--python", python])
        except LocalError as error:
            raise NotAvailable(str(error)) from error
        return test()


def _uvloop() -> int:
    raise NotAvailable("Sublet supports the event loop of asyncio only")


def find_python(version: str) -> str | None:
    """A working interpreter of this version: one on PATH, or one that pyenv has installed."""
    on_path = shutil.which(f"python{version}")
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv", "versions")
    installed = sorted(map(str, pyenv.glob(f"{version}.*/bin/python{version}")))
    # A command on PATH can be a shim of pyenv for a version that is not selected. It fails when it is run.
    candidates = [on_path, *installed] if on_path else installed
    return next((python for python in candidates if _version_of(python) == version), None)


def _version_of(python: str) -> str:
    """Such as 3.11; empty if the program does not run."""
    code = "import sys; print('{}.{}'.format(*sys.version_info))"
    return _output([python, "-c", code])


def _output(arguments: Sequence[str]) -> str:
    try:
        done = subprocess.run(arguments, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


@contextlib.contextmanager
def _environment(directory: Path) -> Iterator[None]:
    """Use this virtual environment instead of the project's usual one."""
    before = os.environ.get("UV_PROJECT_ENVIRONMENT")
    os.environ["UV_PROJECT_ENVIRONMENT"] = str(directory)
    try:
        yield
    finally:
        del os.environ["UV_PROJECT_ENVIRONMENT"]
        if before is not None:
            os.environ["UV_PROJECT_ENVIRONMENT"] = before
