"""Workflows give nobody more than they need, and take in nothing that others wrote."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from dynamo_tools.finding import Finding
from dynamo_tools.process import clean_environment, run, tool
from dynamo_tools.workspace import Workspace

GATE = "workflows"
FOLDER = ".github"


def check(workspace: Workspace) -> Iterator[Finding]:
    """Report what zizmor finds, offline."""
    if not (workspace.root / FOLDER).is_dir():
        return
    argv = [tool("zizmor"), "--offline", "--no-progress", "--format", "json", FOLDER]
    result = run(argv, workspace.root, timeout_s=120, env=clean_environment())
    try:
        findings: list[dict[str, Any]] = json.loads(result.stdout)
    except json.JSONDecodeError:
        yield Finding(FOLDER, 1, GATE, f"zizmor cannot read the workflows: {result.tail(3)}")
        return
    for found in findings:
        if found["ignored"]:
            continue
        place = found["locations"][0]
        path = place["symbolic"]["key"]["Local"]["verbatim_path"]
        row = int(place["concrete"]["location"]["start_point"]["row"]) + 1
        yield Finding(path, row, GATE, f"{found['desc']} ({found['ident']})")
