"""Types, by pyright in strict mode over the whole workspace."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dynamo_tools.finding import Finding
from dynamo_tools.process import run, tool
from dynamo_tools.workspace import Workspace

GATE = "types"


def check(workspace: Workspace) -> Iterator[Finding]:
    """Report what pyright finds; warnings fail too."""
    result = run([tool("pyright"), "--outputjson"], workspace.root)
    start = result.stdout.find("{")
    if start < 0:
        yield Finding("pyproject.toml", 1, GATE, result.tail(3))
        return
    report = json.loads(result.stdout[start:])
    yield from diagnostics(workspace, report)
    sources = workspace.python_files(*(package.src for package in workspace.members))
    analysed = int(report["summary"]["filesAnalyzed"])
    if analysed < len(sources):
        message = f"pyright read {analysed} of {len(sources)} files; its include misses some"
        yield Finding("pyproject.toml", 1, GATE, message)


def diagnostics(workspace: Workspace, report: dict[str, Any]) -> Iterator[Finding]:
    """Turn pyright's report into findings."""
    for item in report["generalDiagnostics"]:
        path = Path(item.get("file", workspace.root / "pyproject.toml"))
        name = workspace.relative(path) if path.is_relative_to(workspace.root) else str(path)
        line = int(item.get("range", {}).get("start", {}).get("line", 0)) + 1
        message = item["message"].splitlines()[0]
        yield Finding(name, line, GATE, f"{message} ({item.get('rule', item['severity'])})")
