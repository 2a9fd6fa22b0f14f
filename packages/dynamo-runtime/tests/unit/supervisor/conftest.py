from __future__ import annotations

import asyncio
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

LIMIT_S = 20.0

HELPERS = """
import os, signal, sys, threading
def ready(status_url=""):
    os.write(int(os.environ["DYN_RUNTIME_READY_FD"]), b'{"status_url": "%s"}\\n' % status_url.encode())
def wait():
    signal.pause()
"""


class Output:
    """Lines that children wrote."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def __call__(self, line: str, is_error: bool) -> None:
        self.lines.append(("! " if is_error else "") + line)


@pytest.fixture
def output() -> Output:
    return Output()


@pytest.fixture
def script(tmp_path: Path) -> Callable[[str], tuple[str, ...]]:
    """Write a small program with ``ready()`` and ``wait()`` at hand; return its command line."""

    def make(body: str) -> tuple[str, ...]:
        path = tmp_path / f"child{len(list(tmp_path.glob('child*.py')))}.py"
        path.write_text(HELPERS + textwrap.dedent(body), encoding="utf-8")
        return (sys.executable, "-S", "-E", str(path))

    return make


@pytest.fixture
def eventually() -> Callable[[Callable[[], object]], object]:
    """Wait until a condition holds; the deadline only ends a test that fails."""

    async def wait(condition: Callable[[], object]) -> None:
        async with asyncio.timeout(LIMIT_S):
            while not condition():
                await asyncio.sleep(0.005)

    return wait
