"""The examples of libs/sublet/docs/testing.md pass as tests, and pass the type checker."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from support import documents


def write_examples(directory: Path) -> None:
    for name, code in documents.files_in(documents.TESTING.read_text()).items():
        (directory / name).write_text(code)


def test_every_example_passes(tmp_path: Path) -> None:
    write_examples(tmp_path)
    options = ["-q", "-p", "no:cacheprovider", "-o", "asyncio_mode=auto", "--rootdir", str(tmp_path)]
    _run([sys.executable, "-m", "pytest", *options, str(tmp_path)], cwd=tmp_path)


def test_every_example_passes_the_type_checker(tmp_path: Path) -> None:
    write_examples(tmp_path)
    path = os.pathsep.join([str(tmp_path), *(str(source) for source in documents.ROOT.glob("*/*/src"))])
    examples = sorted(str(each) for each in tmp_path.glob("*.py"))
    _run(
        [sys.executable, "-m", "mypy", "--config-file", "pyproject.toml", *examples], cwd=documents.ROOT, MYPYPATH=path
    )


def _run(command: list[str], cwd: Path, **variables: str) -> None:
    done = subprocess.run(command, cwd=cwd, env=os.environ | variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
