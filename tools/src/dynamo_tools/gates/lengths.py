"""Files stay under 400 lines and functions under 60; a longer file gives its reason in its first lines."""

from __future__ import annotations

import ast
import statistics
from collections.abc import Iterator

from dynamo_tools.finding import Finding
from dynamo_tools.source import functions, parse
from dynamo_tools.workspace import Workspace

GATE = "lengths"
FILE_LINES = 400
FILE_LINES_WITH_REASON = 600
FUNCTION_LINES = 60
MEDIAN_FUNCTION_LINES = 10
REASON = "long because"
_REASON_WITHIN = 6


def check(workspace: Workspace) -> Iterator[Finding]:
    """Report files and functions that are too long, and the median function of each package."""
    for path in workspace.python_files():
        tree = parse(path)
        name = workspace.relative(path)
        yield from _file(name, len(path.read_text(encoding="utf-8").splitlines()), tree)
        for function in functions(tree):
            if function.length > FUNCTION_LINES:
                message = f"{function.name} has {function.length} lines, over {FUNCTION_LINES}; split it"
                yield Finding(name, function.line, GATE, message)
    for package in workspace.members:
        lengths = [f.length for path in workspace.python_files(package.src) for f in functions(parse(path))]
        if lengths:
            median = statistics.median(lengths)
            message = f"median function {median:g} lines, longest {max(lengths)}, of {len(lengths)}"
            path = workspace.relative(package.src / "__init__.py")
            yield Finding(path, 1, GATE, message, fails=median >= MEDIAN_FUNCTION_LINES)


def _file(name: str, lines: int, tree: ast.Module) -> Iterator[Finding]:
    if lines > FILE_LINES_WITH_REASON:
        yield Finding(name, lines, GATE, f"{lines} lines, over {FILE_LINES_WITH_REASON}; split it")
    elif lines > FILE_LINES and not _has_reason(tree):
        message = f'{lines} lines, over {FILE_LINES}; split it, or say "{REASON} …" in the first lines of its docstring'
        yield Finding(name, lines, GATE, message)


def _has_reason(tree: ast.Module) -> bool:
    first_lines = (ast.get_docstring(tree) or "").splitlines()[:_REASON_WITHIN]
    return REASON in " ".join(first_lines).lower()
