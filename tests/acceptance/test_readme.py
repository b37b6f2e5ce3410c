"""The README's examples run as it says, and print what it says."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from deploy.localstack.paths import command
from deploy.localstack.ports import wait_until

from acceptance.stack import Stack
from support import documents

pytestmark = pytest.mark.real

PATIENCE_S = 60.0
PAID = "{'invoice': 'INV-42', 'outcome': 'paid'}"


@pytest.fixture
def examples(tmp_path: Path) -> Path:
    """A directory with the README's files. Each payment has its own id, as real payments do."""
    documents.write_files(tmp_path)
    for name in ("pay.py", "pay.js"):
        file = tmp_path / name
        file.write_text(file.read_text().replace("payment-1001", f"payment-{uuid.uuid4()}"))
    return tmp_path


@pytest.fixture
def shop(stack: Stack, examples: Path) -> Iterator[Path]:
    """The same directory; the worker of ``shop.py`` runs."""
    with _worker(stack, examples, "shop"):
        yield examples


@contextlib.contextmanager
def _worker(stack: Stack, directory: Path, module: str) -> Iterator[None]:
    arguments = [command("sublet-worker"), f"{module}:worker"]
    worker = stack.run(f"worker-{module}", arguments, {"PYTHONPATH": str(directory)})
    try:
        worker.wait_until_ready()
        yield
    finally:
        stack.forget(worker)


def test_the_first_example_prints_what_the_readme_says(stack: Stack, examples: Path) -> None:
    with _worker(stack, examples, "approval"):
        done = subprocess.run(
            [command("python"), "approval.py"],
            cwd=examples,
            env=os.environ | stack.variables,
            capture_output=True,
            text=True,
            check=True,
            timeout=PATIENCE_S,
        )
    assert done.stdout == "{'approved by': 'Ada'}\n"
    assert f"prints `{done.stdout.strip()}`" in documents.README.read_text()


def test_a_payment_published_by_aio_pika_completes_the_order(shop: Path, stack: Stack) -> None:
    assert_paid_by([command("python"), "pay.py"], shop, stack)


@pytest.mark.tries("amqp-publish")
def test_a_payment_published_from_the_shell_completes_the_order(shop: Path, stack: Stack) -> None:
    (line,) = [line for code in documents.blocks("sh") for line in code.splitlines() if line.startswith("amqp-publish")]
    assert_paid_by(["bash", "-c", line], shop, stack)


@pytest.mark.tries("amqplib")
def test_a_payment_published_from_node_completes_the_order(shop: Path, stack: Stack) -> None:
    assert_paid_by(["node", "pay.js"], shop, stack)


def assert_paid_by(pay: list[str], shop: Path, stack: Stack) -> None:
    environment = os.environ | stack.variables
    output = shop / "shop.log"
    with output.open("w") as log:
        start = subprocess.Popen([command("python"), "-u", "shop.py"], cwd=shop, env=environment, stdout=log)
    try:
        wait_until(lambda: "parcel" in output.read_text(), PATIENCE_S, "the DAG did not complete")
        assert re.search(r"\{'reserve': \{'shelf': 2\}, 'pack': \{'parcel': 'from shelf 2'\}\}", output.read_text())
        assert "outcome" not in output.read_text()
        subprocess.run(pay, cwd=shop, env=environment, check=True, timeout=PATIENCE_S)
        assert start.wait(PATIENCE_S) == 0
    finally:
        start.kill()
    assert PAID in output.read_text()
    assert PAID in documents.README.read_text()
