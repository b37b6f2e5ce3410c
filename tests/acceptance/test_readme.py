"""The README's first workflow, typed in and run as it says."""

from __future__ import annotations

import os
import re
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from deploy.localstack.places import command
from deploy.localstack.ports import wait_until

from acceptance.stack import Stack
from support import documents

pytestmark = pytest.mark.real

PATIENCE_S = 60.0


@pytest.fixture
def shop(stack: Stack, tmp_path: Path) -> Iterator[Path]:
    """A directory with the README's files, whose worker runs. Every payment has an id of its own, as in life."""
    documents.write_files(tmp_path)
    for name in ("pay.py", "pay.js"):
        file = tmp_path / name
        file.write_text(file.read_text().replace("payment-1001", f"payment-{uuid.uuid4()}"))
    worker = stack.run("worker-shop", [command("sublet-worker"), "shop:worker"], {"PYTHONPATH": str(tmp_path)})
    try:
        worker.wait_until_ready()
        yield tmp_path
    finally:
        stack.forget(worker)


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
    variables = os.environ | stack.variables
    output = shop / "start.log"
    with output.open("w") as log:
        start = subprocess.Popen([command("python"), "-u", "start.py"], cwd=shop, env=variables, stdout=log)
    try:
        wait_until(lambda: "parcel" in output.read_text(), PATIENCE_S, "the DAG did not end")
        assert re.search(r"\{'reserve': \{'shelf': 2\}, 'pack': \{'parcel': 'from shelf 2'\}\}", output.read_text())
        assert "outcome" not in output.read_text()
        subprocess.run(pay, cwd=shop, env=variables, check=True, timeout=PATIENCE_S)
        assert start.wait(PATIENCE_S) == 0
    finally:
        start.kill()
    assert "{'invoice': 'INV-42', 'outcome': 'paid'}" in output.read_text()
