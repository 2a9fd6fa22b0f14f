"""Formatting and lint, by ruff with the settings of the root."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

from dynamo_tools.finding import Finding
from dynamo_tools.process import run, tool
from dynamo_tools.workspace import Workspace

_PLACE = re.compile(r"^\s*--> (?P<path>.+):(?P<line>\d+):\d+$")


def check_format(workspace: Workspace) -> Iterator[Finding]:
    """Report files that ``ruff format`` would change."""
    result = run([tool("ruff"), "format", "--check"], workspace.root)
    places = [found for line in result.stdout.splitlines() if (found := _PLACE.match(line))]
    for place in places:
        yield Finding(place["path"], int(place["line"]), "format", "is not formatted; run uv run ruff format")
    if result.returncode and not places:
        yield Finding("pyproject.toml", 1, "format", result.tail(3))


def check_lint(workspace: Workspace) -> Iterator[Finding]:
    """Report what ``ruff check`` finds."""
    result = run([tool("ruff"), "check", "--output-format", "json"], workspace.root)
    if result.returncode not in (0, 1):
        yield Finding("pyproject.toml", 1, "lint", result.tail(3))
        return
    for item in json.loads(result.stdout or "[]"):
        path = workspace.relative(Path(item["filename"]))
        yield Finding(path, int(item["location"]["row"]), "lint", f"{item['code']} {item['message']}")
