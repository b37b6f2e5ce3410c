"""Paths and console output."""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
STATE = ROOT / ".sublet"
LOGS = STATE / "logs"


class LocalError(Exception):
    """Something is missing or did not start. The message says what to do."""


def say(message: str) -> None:
    """Print progress to standard error, so that scripts can use standard output."""
    print(f"==> {message}", file=sys.stderr, flush=True)


def environment_dir() -> Path:
    """The directory of the project's virtual environment, where uv expects it."""
    return ROOT / os.environ.get("UV_PROJECT_ENVIRONMENT", ".venv")


def command(name: str) -> str:
    """The path of a console command of the project."""
    path = environment_dir() / "bin" / name
    if not path.exists():
        raise LocalError(f"{name} is not installed: run `deploy/local install`.")
    return str(path)
