"""Each package declares what it imports and imports what it declares, by deptry, one member at a time."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

from dynamo_tools.finding import Finding
from dynamo_tools.process import run, tool
from dynamo_tools.source import is_empty
from dynamo_tools.workspace import Package, Workspace

GATE = "deps"


def check(workspace: Workspace) -> Iterator[Finding]:
    """Report missing, unused and transitive dependencies of every published package."""
    for package in workspace.packages:
        if is_empty(package.src):
            yield Finding(workspace.relative(package.folder / "pyproject.toml"), 1, GATE, "has no code", fails=False)
            continue
        yield from check_package(workspace, package)


def check_package(workspace: Workspace, package: Package) -> Iterator[Finding]:
    """Report one package."""
    config = package.folder / "pyproject.toml"
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        argv = [tool("deptry"), str(package.src), "--config", str(config), "--json-output", str(report), "--no-ansi"]
        argv += ["--known-first-party", package.import_name]
        result = run(argv, package.folder)
        if not report.is_file():
            yield Finding(workspace.relative(config), 1, GATE, result.tail(3))
            return
        found = json.loads(report.read_text(encoding="utf-8"))
    for item in found:
        path = (package.folder / item["location"]["file"]).resolve()
        line = int(item["location"]["line"] or 1)
        yield Finding(workspace.relative(path), line, GATE, f"{item['error']['code']} {item['error']['message']}")
