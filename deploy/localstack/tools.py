"""Installs everything that Sublet needs to run on this machine."""

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
from .paths import ROOT, STATE, LocalError, command, say
from .rabbit import find_script

OLDEST_UV = (0, 9)
UV_REQUIREMENT = "uv>=0.9,<0.14"
UV_DIR = STATE / "uv"
POLICY = Path("/usr/sbin/policy-rc.d")
PACKAGE_OF_LIBRARY = {"libcurl.so.4": "libcurl4", "libssl.so.3": "libssl3", "libcrypto.so.3": "libssl3"}


def install(*, rabbitmq: bool, mongodb: bool) -> None:
    """Install what is missing. If nothing is missing, nothing changes."""
    uv = ensure_uv()
    say("Installing the project's packages (uv sync)")
    run([uv, "sync", "--frozen"])
    if rabbitmq:
        ensure_rabbitmq()
    if mongodb:
        ensure_mongod(uv)


def install_fuzzer() -> None:
    """Install Atheris if it has a wheel for this Python. The fuzzing also works without it."""
    try:
        run([ensure_uv(), "sync", "--frozen", "--group", "fuzz"])
    except LocalError as error:
        say(f"Fuzzing without coverage guidance, because atheris is not available: {error}")


def ensure_uv() -> str:
    """The path of a working uv: the one of the machine, or one from the Python package index."""
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
        raise LocalError(f"{mongod} needs {', '.join(unknown)}: install the packages that contain them.")
    if libraries:
        install_packages(sorted({PACKAGE_OF_LIBRARY[library] for library in libraries}))


def install_packages(packages: Sequence[str]) -> None:
    """Install packages of the distribution. Without root rights, fail with the command that installs them."""
    arguments = ["apt-get", "install", "-y", "--no-install-recommends", *packages]
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        raise LocalError(f"{' '.join(packages)} must be installed. On Debian or Ubuntu: sudo {' '.join(arguments)}")
    say(f"Installing {' '.join(packages)}")
    with services_not_started():
        run(["apt-get", "update", "-q", "-o", "Acquire::Retries=3"])
        run(arguments)


@contextlib.contextmanager
def services_not_started() -> Iterator[None]:
    """Prevent Debian from starting the installed servers. The stack runs its own servers on other ports."""
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
    """Run an installer. Its output is progress; it must not ask questions, because nobody can answer them."""
    environment = os.environ | {
        "DEBIAN_FRONTEND": "noninteractive",
        # Use the Python of the machine. A download might not be reachable.
        "UV_PYTHON_DOWNLOADS": "never",
    }
    done = subprocess.run(
        arguments, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=sys.stderr, check=False
    )
    if done.returncode != 0:
        raise LocalError(f"`{' '.join(arguments)}` failed with status {done.returncode}: see its message above.")
