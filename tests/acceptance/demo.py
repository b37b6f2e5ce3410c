"""The demo, as `deploy/local demo` starts it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from deploy.localstack.places import ROOT, command

PATIENCE_S = 240.0


def play(variables: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [command("python"), str(Path(ROOT, "deploy/demo/run.py"))],
        env=os.environ | variables,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )


def assert_all_came_true(done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 0, done.stdout
    assert "Everything came true." in done.stdout
    assert "✗" not in done.stdout
