"""The committed dump of each package's public surface, and its schemas, are up to date: a review sees each change."""

from __future__ import annotations

import difflib
from collections.abc import Iterator

from dynamo_tools.finding import Finding
from dynamo_tools.semver import schemas
from dynamo_tools.surface import HEADER, dump
from dynamo_tools.workspace import Workspace

GATE = "surface"
DUMP = "api/public.txt"
SHOWN_LINES = 20
_REMEDY = "run uv run dyn surface --write and review the diff"


def check(workspace: Workspace) -> Iterator[Finding]:
    """Report the lines of the surface that differ from the committed dump, the first of them if they are many."""
    for package in workspace.packages:
        path = package.folder / DUMP
        committed = path.read_text(encoding="utf-8") if path.is_file() else HEADER
        name = workspace.relative(path)
        diff = difflib.unified_diff(committed.splitlines(), dump(package).splitlines(), n=0, lineterm="")
        changed = [line for line in diff if line[:1] in "+-" and not line.startswith(("+++", "---"))]
        for line in changed[:SHOWN_LINES]:
            yield Finding(name, 1, GATE, f"{line}; {_REMEDY}")
        schema = package.folder / schemas.FILE
        if (schema.read_text(encoding="utf-8") if schema.is_file() else "") != schemas.dump(workspace, package):
            yield Finding(workspace.relative(schema), 1, GATE, f"is out of date; {_REMEDY}")
        if len(changed) > SHOWN_LINES:
            yield Finding(name, 1, GATE, f"and {len(changed) - SHOWN_LINES} more lines; {_REMEDY}")
