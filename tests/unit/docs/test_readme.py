"""The README agrees with the code: its examples declare what it shows, and its tables hold the values of the code."""

from __future__ import annotations

import ast
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic_settings import BaseSettings

from sublet import ClientConfig
from sublet_platform.settings import ServiceSettings
from sublet_protocol import limits
from sublet_worker.settings import WorkerSettings
from support import documents

SETTINGS: list[type[BaseSettings]] = [ClientConfig, ServiceSettings, WorkerSettings]


def test_every_python_block_is_a_file_that_is_tested() -> None:
    assert len(documents.blocks("python")) == len([name for name in documents.files() if name.endswith(".py")])


def test_the_shop_declares_a_worker_for_all_its_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SUBLET_NAMESPACE", raising=False)
    documents.write_files(tmp_path)
    shop = runpy.run_path(str(tmp_path / "shop.py"))
    worker = shop["worker"]
    assert (worker.slots, worker.durable_slots) == (10, 5)
    assert [task.name for task in shop["fulfil"].tasks] == ["reserve", "pack"]


def test_the_python_examples_pass_the_type_checker(tmp_path: Path) -> None:
    documents.write_files(tmp_path)
    examples = sorted(str(path) for path in tmp_path.glob("*.py"))
    path = os.pathsep.join([str(tmp_path), *(str(source) for source in documents.ROOT.glob("libs/*/src"))])
    arguments = ["-m", "mypy", "--config-file", "pyproject.toml", *examples]
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=documents.ROOT,
        env=os.environ | {"MYPYPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_limits_are_those_of_the_code() -> None:
    shown = {name: cell for name, cell in documents.rows().items() if hasattr(limits, name)}
    assert len(shown) > 10
    assert shown == {name: f"{getattr(limits, name):,.10g}".removesuffix(".0") for name in shown}


def test_every_setting_is_listed_with_its_default() -> None:
    shown = {name: cell for name, cell in documents.rows().items() if name.startswith("SUBLET_")}
    fields = [
        (f"SUBLET_{name.upper()}", field.default)
        for settings in SETTINGS
        for name, field in settings.model_fields.items()
        if name != "logger"
    ]
    assert shown == {name: _cell(default) for name, default in fields}


def _cell(default: object) -> str:
    if default == "":
        return "none"
    return f"`{default:g}`" if isinstance(default, float) else f"`{default}`"


@pytest.mark.parametrize("link", documents.links(), ids=str)
def test_every_link_leads_to_a_file_and_a_heading(link: documents.Link) -> None:
    assert link.target.exists()
    assert not link.anchor or link.anchor in documents.anchors(link.target)


def test_the_examples_are_valid_for_the_oldest_python() -> None:
    for name, code in documents.files().items():
        if name.endswith(".py"):
            ast.parse(code, name, feature_version=(3, 11))
