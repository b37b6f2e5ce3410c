"""`deploy/local test --full` reports what it ran, what failed, and what the machine cannot run."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from deploy.localstack.matrix import NotAvailable, Part, find_python, parts, run_all


def not_available() -> int:
    raise NotAvailable("this machine has no Python 3.99")


def test_the_status_is_0_if_all_parts_that_ran_passed(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_all([Part("tests on Python 3.11", lambda: 0), Part("tests on Python 3.99", not_available)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "tests on Python 3.11" in lines[1]
    assert "passed" in lines[1]
    assert "tests on Python 3.99" in lines[2]
    assert "not run: this machine has no Python 3.99" in lines[2]


def test_the_parts_after_a_failed_one_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_all([Part("first", lambda: 2), Part("second", lambda: 0)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert "FAILED with status 2" in lines[1]
    assert "passed" in lines[2]


def test_the_status_is_1_if_no_part_ran() -> None:
    assert run_all([Part("tests on Python 3.99", not_available)]) == 1


def test_the_simulation_runs_as_many_seeds_as_asked_for() -> None:
    simulated: list[int] = []

    def simulate(seeds: int) -> int:
        simulated.append(seeds)
        return 0

    assert parts(lambda: 0, simulate, seeds=7)[-1].run() == 0
    assert simulated == [7]


def test_an_interpreter_that_does_not_run_is_not_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shim = tmp_path / "python3.99"
    shim.write_text("#!/bin/sh\nexit 127\n")
    shim.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path))
    assert find_python("3.99") is None


def test_an_interpreter_of_pyenv_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    version = "{}.{}".format(*sys.version_info)
    folder = tmp_path / "versions" / f"{version}.0" / "bin"
    folder.mkdir(parents=True)
    (folder / f"python{version}").symlink_to(sys.executable)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path))
    assert find_python(version) == str(folder / f"python{version}")
