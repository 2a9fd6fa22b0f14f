"""``uv.lock`` agrees with every ``pyproject.toml``."""

from __future__ import annotations

from collections.abc import Iterator

from dynamo_tools.finding import Finding
from dynamo_tools.process import run, tool
from dynamo_tools.workspace import Workspace

GATE = "lock"


def check(workspace: Workspace) -> Iterator[Finding]:
    """Report a lock that is out of date."""
    result = run([tool("uv"), "lock", "--check"], workspace.root, timeout_s=120)
    if result.returncode:
        yield Finding("uv.lock", 1, GATE, f"{result.tail(2)}; run uv lock")
