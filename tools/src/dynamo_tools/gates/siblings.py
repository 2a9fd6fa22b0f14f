"""A component knows core and third-party libraries; no file of it, tests and README included, names a sibling."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from packaging.requirements import Requirement

from dynamo_tools.finding import Finding
from dynamo_tools.source import parse, python_blocks
from dynamo_tools.workspace import CORE, Package, Workspace

GATE = "siblings"
_LOADERS = {"import_module", "__import__", "importorskip", "find_spec", "run_module"}


def check(workspace: Workspace) -> Iterator[Finding]:
    """Report imports of siblings, as statements or by name, and dependencies on siblings."""
    names = {package.name for package in workspace.members}
    for package in workspace.packages:
        siblings = names - {package.name, CORE}
        modules = {name.replace("-", "_") for name in siblings}
        for path in workspace.python_files(package.folder):
            for line, module in _imported(parse(path)):
                if module.split(".")[0] in modules:
                    yield Finding(workspace.relative(path), line, GATE, _message(package, module))
        yield from _readme(workspace, package, modules)
        yield from _dependencies(workspace, package, siblings)


def _message(package: Package, module: str) -> str:
    allowed = "nothing of the workspace" if package.name == CORE else "dynamo_core only"
    return f"{package.name} imports {module}; it may import {allowed}, meet siblings through core's Protocols"


def _imported(tree: ast.AST) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.lineno, node.module
        elif isinstance(node, ast.Call) and _name(node.func) in _LOADERS:
            yield from ((node.lineno, text) for text in _strings(node.args[:1]))
        elif isinstance(node, ast.Assign) and any(_name(target) == "pytest_plugins" for target in node.targets):
            yield from ((node.lineno, text) for text in _strings([node.value]))


def _name(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def _strings(nodes: list[ast.expr]) -> Iterator[str]:
    for root in nodes:
        for node in ast.walk(root):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def _readme(workspace: Workspace, package: Package, modules: set[str]) -> Iterator[Finding]:
    path: Path = package.folder / "README.md"
    if not path.is_file():
        return
    for start, code in python_blocks(path):
        try:
            tree = ast.parse(code)
        except SyntaxError as error:
            message = f"python block does not parse: {error.msg}"
            yield Finding(workspace.relative(path), start + (error.lineno or 1) - 1, GATE, message)
            continue
        for line, module in _imported(tree):
            if module.split(".")[0] in modules:
                yield Finding(workspace.relative(path), start + line - 1, GATE, _message(package, module))


def _dependencies(workspace: Workspace, package: Package, siblings: set[str]) -> Iterator[Finding]:
    path = workspace.relative(package.folder / "pyproject.toml")
    project = package.config["project"]
    extras = [entry for entries in project.get("optional-dependencies", {}).values() for entry in entries]
    groups = [entry for entries in package.config.get("dependency-groups", {}).values() for entry in entries]
    for entry in [*project.get("dependencies", []), *extras, *groups]:
        if isinstance(entry, str) and Requirement(entry).name in siblings:
            yield Finding(path, 1, GATE, f"{package.name} requires {entry}; a component depends on dynamo-core alone")
