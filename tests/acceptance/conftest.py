"""A stack for the session, and a lab on it for each test."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
from deploy.localstack.places import LocalError

import namespaces
from acceptance.lab import Lab
from acceptance.stack import Stack

_FAILED = pytest.StashKey[bool]()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what tries Sublet with a program that it does not need itself, where that program is not."""
    there = {
        "prometheus": _has("prometheus"),
        "amqp-publish": _has("amqp-publish"),
        "amqplib": _node_has_amqplib(),
        "compose": os.environ.get("SUBLET_TEST_COMPOSE") == "1",
        "netns": namespaces.may_be_made(),
    }
    out = [item for item in items if not all(there[name] for mark in item.iter_markers("tries") for name in mark.args)]
    if out:
        config.hook.pytest_deselected(items=out)
        items[:] = [item for item in items if item not in out]


def _has(program: str) -> bool:
    return shutil.which(program) is not None


def _node_has_amqplib() -> bool:
    if not _has("node"):
        return False
    return subprocess.run(["node", "-e", "require('amqplib')"], capture_output=True, check=False).returncode == 0


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    item.stash[_FAILED] = item.stash.get(_FAILED, False) or report.failed
    return report


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Shared by most tests. Whoever stops a part of it uses `mended_stack`."""
    shared = Stack(tmp_path_factory.mktemp("stack"))
    try:
        shared.start()
        yield shared
    except LocalError as error:
        if os.environ.get("SUBLET_REQUIRE_SERVERS") == "1":
            pytest.fail(f"SUBLET_REQUIRE_SERVERS=1, but {error}")
        pytest.skip(str(error))
    finally:
        shared.stop()


@pytest.fixture
def mended_stack(stack: Stack) -> Iterator[Stack]:
    """The shared stack, made whole again after the test."""
    yield stack
    stack.repair()


@pytest.fixture
def fresh_stack(stack: Stack, tmp_path: Path) -> Iterator[Stack]:
    """A second one, nothing of which has been started yet."""
    fresh = Stack(tmp_path / "stack")
    try:
        yield fresh
    finally:
        fresh.stop()


@pytest.fixture
def lab(stack: Stack, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Lab]:
    lab = Lab(stack, tmp_path)
    try:
        yield lab
    finally:
        if request.node.stash.get(_FAILED, False):
            stack.show_logs()
        lab.close()
