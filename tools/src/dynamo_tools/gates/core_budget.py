"""Core stays small: at most 3,000 logical lines of code without the conformance kit.

It counts as `docs/decisions/0002-core-line-budget.md` says and as core's own test does: one statement is one line.
"""

from __future__ import annotations

from collections.abc import Iterator

from dynamo_tools.finding import Finding
from dynamo_tools.source import code_lines
from dynamo_tools.workspace import Workspace

GATE = "core-budget"
CODE_LINES = 3000


def check(workspace: Workspace) -> Iterator[Finding]:
    """Report core's logical lines of code: a note within the budget, a finding beyond it."""
    core = workspace.core
    if core is None:
        return
    kit = core.src / "testing"
    sources = [path for path in workspace.python_files(core.src) if not path.is_relative_to(kit)]
    counts = {path: code_lines(path) for path in sources}
    total = sum(counts.values())
    largest = max(counts, key=counts.__getitem__, default=core.src)
    message = f"{total} of {CODE_LINES} logical lines of code; the largest file is {largest.name}"
    message += f" with {counts.get(largest, 0)}"
    yield Finding(workspace.relative(core.src), 1, GATE, message, fails=total > CODE_LINES)
