"""Running the Python blocks of Markdown files as a reader would: copied into a file, in an empty folder."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

from dynamo_tools.process import Result, clean_environment, run
from dynamo_tools.source import python_blocks

TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Ran:
    """One block that ran: the line its code starts on, and how it ended."""

    line: int
    result: Result


def run_blocks(markdown: Path, python: Path, *, first_only: bool = False) -> list[Ran]:
    """Run the ``python`` blocks of a file in order, each in a process of its own."""
    blocks = python_blocks(markdown)[:1] if first_only else python_blocks(markdown)
    return [Ran(line, run_code(code, python)) for line, code in blocks]


def run_code(code: str, python: Path) -> Result:
    """Run a program in an empty folder, with warnings as errors."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "example.py"
        path.write_text(code, encoding="utf-8")
        argv = [str(python), "-W", "error", str(path)]
        return run(argv, Path(folder), timeout_s=TIMEOUT_S, env=clean_environment())
