"""The examples as their README says: a worker for each of them, and the program itself."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from datetime import timedelta

import httpx
import pytest
from deploy.localstack.paths import ROOT, command
from deploy.localstack.ports import accepts_connections, choose_ports, wait_until

from acceptance.processes import Process
from acceptance.stack import Stack
from examples import approval
from sublet import ClientConfig, Sublet

pytestmark = pytest.mark.real

EXAMPLES = ROOT / "libs/sublet/examples"
NAMESPACE = "examples_"
SETTINGS = {"PYTHONPATH": str(EXAMPLES), "PYTHONUNBUFFERED": "1", "SUBLET_NAMESPACE": NAMESPACE}
PATIENCE_S = 60.0

Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture(scope="module")
def workers(stack: Stack) -> Iterator[dict[str, Process]]:
    """One for each example, all at once, by the name of the example."""
    started = {
        path.stem: stack.run(path.stem, [command("sublet-worker"), f"{path.stem}:worker"], SETTINGS)
        for path in EXAMPLES.glob("*.py")
    }
    try:
        for worker in started.values():
            worker.wait_until_ready()
        yield started
    finally:
        for worker in started.values():
            stack.forget(worker)


@pytest.fixture
def start(stack: Stack, workers: dict[str, Process]) -> Iterator[Start]:
    """Starts the program of an example with these arguments."""
    programs: list[subprocess.Popen[str]] = []

    def run(name: str, *arguments: str) -> subprocess.Popen[str]:
        line = [command("python"), f"{name}.py", *arguments]
        environment = os.environ | stack.variables | SETTINGS
        programs.append(subprocess.Popen(line, cwd=EXAMPLES, env=environment, stdout=subprocess.PIPE, text=True))
        return programs[-1]

    yield run
    for program in programs:
        program.kill()
        program.communicate()


@pytest.fixture
def client(stack: Stack, workers: dict[str, Process]) -> Iterator[Sublet]:
    client = Sublet(ClientConfig(amqp_url=stack.variables["SUBLET_AMQP_URL"], namespace=NAMESPACE))
    yield client
    client.close()


def output_of(program: subprocess.Popen[str]) -> str:
    """All that it prints until it ends well."""
    output, _ = program.communicate(timeout=PATIENCE_S)
    assert program.returncode == 0
    return output


def logged(worker: Process, pattern: str) -> str:
    """What the group of the pattern holds, as soon as the worker has logged it."""
    wait_until(lambda: re.search(pattern, worker.log.read_text()) is not None, PATIENCE_S, f"no log of {pattern!r}")
    found = re.search(pattern, worker.log.read_text())
    assert found is not None
    return found[1]


def test_a_purchase_is_approved(start: Start, workers: dict[str, Process]) -> None:
    asking = start("approval")
    run = logged(workers["approval"], r"A boat: yes or no\? Run (\S+)\s")
    output_of(start("approval", run, "yes"))
    assert output_of(asking).splitlines() == [
        f"Answer with: python approval.py {run} yes",
        "outcome='approved' mails=1",
    ]


def test_a_purchase_expires_after_its_reminders(client: Sublet) -> None:
    stub = client.stubs.task(name="approval", input_validator=approval.Purchase, output_validator=approval.Decision)
    at_once = approval.Purchase(item="A car", approver="ann", manager="bo", remind_every=timedelta(milliseconds=20))
    assert stub.run(at_once) == approval.Decision(outcome="expired", mails=4)


def test_clips_are_rendered_one_at_a_time_and_uploaded(start: Start, client: Sublet) -> None:
    urls = output_of(start("gpu_then_upload")).splitlines()
    assert urls == [f"https://clips.example/clip-{n}?bytes=6" for n in range(4)]
    runs = client.runs.list(workflow_ids=["render_clip"]).rows
    retries = [task.retry_count for run in runs for task in client.runs.get(run.metadata.id).tasks]
    assert retries == [0] * 4, "two clips were on the GPU at once"


def test_an_agent_asks_a_human_and_acts(start: Start, workers: dict[str, Process]) -> None:
    acting = start("agent")
    question = logged(workers["agent"], r"Answer question ([\w-]+)")
    output_of(start("agent", question, "evening"))
    assert output_of(acting) == "The evening flight is booked.\n"


def test_an_order_by_http_is_shipped_after_the_webhook(stack: Stack, workers: dict[str, Process]) -> None:
    port = choose_ports("http")["http"]
    server = stack.run("web", [command("uvicorn"), "web_app:app", "--port", str(port)], SETTINGS)
    try:
        wait_until(lambda: accepts_connections(port), PATIENCE_S, "the web server did not start")
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=PATIENCE_S, trust_env=False) as http:
            assert_shipped(http)
    finally:
        stack.forget(server)


def assert_shipped(http: httpx.Client) -> None:
    order_id = http.post("/orders", json={"item": "book", "cents": 1200}).json()["order_id"]
    assert http.get(f"/orders/{order_id}").json()["result"] is None
    http.post("/webhooks/payments", json={"order_id": order_id, "cents": 1200}).raise_for_status()
    wait_until(
        lambda: http.get(f"/orders/{order_id}").json()["result"] == {"outcome": "shipped"},
        PATIENCE_S,
        "the order was not shipped",
    )


def test_a_file_is_imported_but_for_its_failed_row(start: Start) -> None:
    report = output_of(start("fan_out"))
    assert report == """imported=3 pieces=2450 failed=["row 3: 'many' is not a quantity"]\n"""


@pytest.mark.parametrize(
    ("city", "outcome"),
    [
        ("Lisbon", {"booked": ["flight", "hotel", "car"], "cancelled": [], "reason": ""}),
        ("Venice", {"booked": [], "cancelled": ["car", "hotel", "flight"], "reason": "there are no cars in Venice"}),
    ],
)
def test_a_trip_is_booked_or_cancelled(city: str, outcome: dict[str, object], start: Start) -> None:
    assert json.loads(output_of(start("saga", city))) == outcome
