"""``__all__`` of each package is sorted and equals its public names, and a test of the package says so too."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from itertools import pairwise

from dynamo_tools.finding import Finding
from dynamo_tools.source import FunctionNode, is_empty, parse
from dynamo_tools.workspace import Package, Workspace

GATE = "exports"


def check(workspace: Workspace) -> Iterator[Finding]:
    """Report modules whose ``__all__`` is missing, unsorted, or differs from what they define and re-export."""
    for package in workspace.packages:
        yield from _package(workspace, package)
        for path in workspace.python_files(package.src):
            tree = parse(path)
            declared = _declared(tree)
            if declared is None or path == package.src / "__init__.py":
                continue
            yield from _order(workspace.relative(path), *declared)
            for name in sorted(set(declared[1]) - _bound(tree)):
                yield Finding(workspace.relative(path), declared[0], GATE, f"__all__ names {name}, which is not there")


def _package(workspace: Workspace, package: Package) -> Iterator[Finding]:
    path = package.src / "__init__.py"
    name = workspace.relative(path)
    if not path.is_file():
        yield Finding(workspace.relative(package.folder), 1, GATE, f"src/{package.import_name}/__init__.py is missing")
        return
    tree = parse(path)
    public, declared = _public(tree, package.import_name), _declared(tree)
    if declared is None:
        message = "__all__ is missing; list the public names, sorted"
        yield Finding(name, 1, GATE, message, fails=not is_empty(package.src))
        return
    line, names = declared
    yield from _order(name, line, names)
    for missing in sorted(public - set(names)):
        yield Finding(name, line, GATE, f"{missing} is public and not in __all__; add it or start it with _")
    for extra in sorted(set(names) - public):
        yield Finding(name, line, GATE, f"__all__ names {extra}, which the package does not define")
    if names and not (package.tests / "api" / "test_exports.py").is_file():
        yield Finding(name, line, GATE, f"{workspace.relative(package.tests)}/api/test_exports.py is missing")


def _order(name: str, line: int, names: list[str]) -> Iterator[Finding]:
    wrong = next((b for a, b in pairwise(names) if a >= b), None)
    if wrong is not None:
        yield Finding(name, line, GATE, f"__all__ is not sorted or repeats a name, at {wrong!r}")


def _declared(tree: ast.Module) -> tuple[int, list[str]] | None:
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else []
        if any(isinstance(target, ast.Name) and target.id == "__all__" for target in targets):
            assert isinstance(node, ast.Assign)
            return node.lineno, [str(item) for item in ast.literal_eval(node.value)]
    return None


def _public(tree: ast.Module, import_name: str) -> set[str]:
    """Names without underscore that a module defines or imports from its own package."""
    names: set[str] = set()
    for node in _statements(tree.body):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] != import_name:
            continue
        if not isinstance(node, ast.Import):
            names |= _names(node)
    return {name for name in names if not name.startswith("_")}


def _bound(tree: ast.Module) -> set[str]:
    return {name for node in _statements(tree.body) for name in _names(node)}


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    for node in body:
        if isinstance(node, ast.If | ast.Try):
            yield from _statements(node.body)
            yield from _statements(node.orelse)
        else:
            yield node


def _names(node: ast.stmt) -> set[str]:
    if isinstance(node, ast.Import | ast.ImportFrom):
        return {(alias.asname or alias.name).split(".")[0] for alias in node.names}
    if isinstance(node, FunctionNode | ast.ClassDef):
        return {node.name}
    if isinstance(node, ast.Assign):
        return {target.id for target in node.targets if isinstance(target, ast.Name)}
    if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        return {node.target.id}
    return set()
