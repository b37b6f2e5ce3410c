"""The demo, as `deploy/local demo` starts it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from deploy.localstack.paths import ROOT, command

TIMEOUT_S = 240.0


def run_demo(variables: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [command("python"), str(Path(ROOT, "deploy/demo/run.py"))],
        env=os.environ | variables,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )


def assert_all_checks_passed(done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 0, done.stdout
    assert "All checks passed." in done.stdout
    assert "✗" not in done.stdout
