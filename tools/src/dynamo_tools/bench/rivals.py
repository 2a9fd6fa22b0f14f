"""Other people's software in environments of its own, so that it is measured beside ours on the same machine."""

from __future__ import annotations

import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dynamo_tools.process import clean_environment, run, tool

_READY = ".ready"


@dataclass(frozen=True)
class Rival:
    """Software from the package index.

    Attributes:
        name: Name in the report and of its folder below the cache.
        requirements: What to install, each with an exact version so that figures stay comparable.
    """

    name: str
    requirements: tuple[str, ...]


def install(rival: Rival, cache: Path) -> Path | None:
    """Return the rival's Python, installing it first if needed; None, with a line on stderr, if it cannot be."""
    folder = cache / rival.name
    python, ready = folder / "bin" / "python", folder / _READY
    wanted = "\n".join(rival.requirements)
    if ready.is_file() and ready.read_text(encoding="utf-8") == wanted:
        return python
    for argv in (
        [tool("uv"), "venv", "--quiet", "--clear", str(folder)],
        [tool("uv"), "pip", "install", "--quiet", "--python", str(python), *rival.requirements],
    ):
        result = run(argv, cache.parent, env=clean_environment())
        if result.returncode:
            print(f"bench: {rival.name} cannot be installed, its value is null: {result.tail(1)}", file=sys.stderr)
            return None
    ready.write_text(wanted, encoding="utf-8")
    return python


def measure(rival: Rival, cache: Path, program: str, arguments: Sequence[str] = ()) -> float | None:
    """Run a program in the rival's environment and return the median of the numbers it prints, or None."""
    python = install(rival, cache)
    if python is None:
        return None
    argv = [str(python), "-c", program, *arguments]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, env=clean_environment())
    if done.returncode:
        print(f"bench: {rival.name} failed, its value is null: {done.stderr.strip()[-200:]}", file=sys.stderr)
        return None
    return statistics.median(float(line) for line in done.stdout.split())
