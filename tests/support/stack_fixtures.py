"""Fixtures for tests that need all of Sublet as real processes: a stack for the session, and an environment on it for
each test.

Clients and drivers are imported where they are needed, so that a unit test does not pay for them.
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from deploy.localstack.paths import LocalError

from support import network_namespaces

if TYPE_CHECKING:
    from acceptance.environment import Environment
    from acceptance.stack import Stack

_FAILED = pytest.StashKey[bool]()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip tests that need a program which Sublet itself does not need, if it is not installed."""
    out = [
        item for item in items if not all(_is_there(name) for mark in item.iter_markers("tries") for name in mark.args)
    ]
    if out:
        config.hook.pytest_deselected(items=out)
        items[:] = [item for item in items if item not in out]


@functools.cache
def _is_there(name: str) -> bool:
    match name:
        case "amqplib":
            return _node_has_amqplib()
        case "compose":
            return os.environ.get("SUBLET_TEST_COMPOSE") == "1"
        case "netns":
            return network_namespaces.may_be_made()
        case _:
            return _has(name)


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
    """The stack that most tests share. A test that stops a part of it uses `mended_stack`."""
    from acceptance.stack import Stack

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
    """The shared stack. Its stopped parts are started again after the test."""
    yield stack
    stack.repair()


@pytest.fixture
def fresh_stack(stack: Stack, tmp_path: Path) -> Iterator[Stack]:
    """A second stack, of which nothing has been started."""
    from acceptance.stack import Stack

    fresh = Stack(tmp_path / "stack")
    try:
        yield fresh
    finally:
        fresh.stop()


@pytest.fixture
def environment(stack: Stack, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Environment]:
    from acceptance.environment import Environment

    environment = Environment(stack, tmp_path)
    try:
        yield environment
    finally:
        if request.node.stash.get(_FAILED, False):
            stack.show_logs()
        environment.close()
