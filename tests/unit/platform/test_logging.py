"""The format of log records."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator

import pytest
import structlog

from sublet_platform.logging import set_up_logging


@pytest.fixture(autouse=True)
def restored_logging() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    structlog.reset_defaults()


def test_a_record_of_the_standard_library_is_one_json_object(capsys: pytest.CaptureFixture[str]) -> None:
    set_up_logging("timer", form="json")
    logging.getLogger("sublet.test").warning("%d timers are late", 3, extra={"lag_s": 1.5})
    record = json.loads(capsys.readouterr().err)
    assert record["event"] == "3 timers are late"
    assert (record["service"], record["level"], record["logger"]) == ("timer", "warning", "sublet.test")
    assert record["lag_s"] == 1.5


def test_an_exception_stays_on_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    set_up_logging("timer", form="json")
    try:
        raise ValueError("no such order")
    except ValueError:
        logging.getLogger("sublet.test").exception("failed")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert "ValueError: no such order" in json.loads(lines[0])["exception"]


def test_records_of_structlog_have_the_same_format(capsys: pytest.CaptureFixture[str]) -> None:
    set_up_logging("timer", form="json")
    structlog.get_logger("sublet.test").info("granted", lease="r.t@1")
    record = json.loads(capsys.readouterr().err)
    assert (record["event"], record["lease"], record["service"]) == ("granted", "r.t@1", "timer")


def test_the_console_format_is_a_line_of_text(capsys: pytest.CaptureFixture[str]) -> None:
    set_up_logging("timer", form="console")
    logging.getLogger("sublet.test").info("granted", extra={"lease": "r.t@1"})
    line = capsys.readouterr().err
    assert "granted" in line
    assert "lease=r.t@1" in line


def test_verbose_libraries_have_a_higher_level_unless_the_level_is_debug() -> None:
    set_up_logging("timer", level="INFO")
    assert not logging.getLogger("aio_pika").isEnabledFor(logging.INFO)
    set_up_logging("timer", level="DEBUG")
    assert logging.getLogger("aio_pika").isEnabledFor(logging.DEBUG)
