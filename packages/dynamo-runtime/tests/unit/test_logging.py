"""Logs and traces of a process, configured in a process of their own: both are global."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

LIMIT_S = 30.0

PROGRAM = """
import logging, structlog
from dynamo_runtime._logging import configure_logging
configure_logging("info", "{format}")
structlog.contextvars.bind_contextvars(request_id="r1", worker_id="2a/0")
log = structlog.get_logger("test")
log.debug("hidden")
log.info("shown", tokens=7)
logging.getLogger("library").warning("from a library")
logging.getLogger("library").info("chatter")
try:
    prompt = "a secret" + " prompt"
    1 / 0
except ZeroDivisionError:
    log.exception("failed")
"""

TRACED = """
import structlog
from dynamo_runtime._logging import configure_logging
from opentelemetry import trace
from opentelemetry.trace import NonRecordingSpan, SpanContext
configure_logging("info", "json")
span = NonRecordingSpan(SpanContext(trace_id=0xABC, span_id=0xDEF, is_remote=True))
with trace.use_span(span):
    structlog.get_logger("test").info("inside")
"""


def logged(program: str) -> list[str]:
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=LIMIT_S)
    assert result.returncode == 0, result.stderr
    assert result.stdout == ""
    return result.stderr.splitlines()


def test_json_lines_carry_what_is_bound_and_tell_errors_on_one_line() -> None:
    lines = [json.loads(line) for line in logged(PROGRAM.format(format="json"))]
    assert [line["event"] for line in lines] == ["shown", "from a library", "failed"]
    assert {key: lines[0][key] for key in ("level", "tokens", "request_id", "worker_id")} == {
        "level": "info",
        "tokens": 7,
        "request_id": "r1",
        "worker_id": "2a/0",
    }
    assert lines[1]["request_id"] == "r1"
    assert "ZeroDivisionError" in lines[2]["exception"]


def test_without_a_terminal_auto_means_json() -> None:
    assert json.loads(logged(PROGRAM.format(format="auto"))[0])["event"] == "shown"


def test_console_lines_are_key_value() -> None:
    first = logged(PROGRAM.format(format="console"))[0]
    assert "shown" in first
    assert "tokens=7" in first
    assert "\x1b" not in first


@pytest.mark.parametrize("log_format", ["console", "json"])
def test_a_traceback_shows_no_values(log_format: str) -> None:
    lines = "\n".join(logged(PROGRAM.format(format=log_format)))
    assert "ZeroDivisionError" in lines
    assert "a secret prompt" not in lines


def test_a_line_inside_a_span_names_the_trace() -> None:
    line = json.loads(logged(TRACED)[0])
    assert line["trace_id"] == f"{0xABC:032x}"
    assert line["span_id"] == f"{0xDEF:016x}"
