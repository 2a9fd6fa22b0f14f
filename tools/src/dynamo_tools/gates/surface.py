"""The committed dump of each package's public surface is up to date, so every change of it is seen in review."""

from __future__ import annotations

import difflib
from collections.abc import Iterator

from dynamo_tools.finding import Finding
from dynamo_tools.surface import HEADER, dump
from dynamo_tools.workspace import Workspace

GATE = "surface"
DUMP = "api/public.txt"


def check(workspace: Workspace) -> Iterator[Finding]:
    """Report each line of the surface that differs from the committed dump."""
    for package in workspace.packages:
        path = package.folder / DUMP
        committed = path.read_text(encoding="utf-8") if path.is_file() else HEADER
        name = workspace.relative(path)
        for line in difflib.unified_diff(committed.splitlines(), dump(package).splitlines(), n=0, lineterm=""):
            if line[:1] in "+-" and not line.startswith(("+++", "---")):
                yield Finding(name, 1, GATE, f"{line}; run uv run dyn surface --write and review the diff")
