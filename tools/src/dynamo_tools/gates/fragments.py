"""Every change of a package's source has a changelog fragment, and only a release edits ``CHANGELOG.md``."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import PurePosixPath

from dynamo_tools.changes import Base, branch_base, changed_files, release_base
from dynamo_tools.finding import Finding
from dynamo_tools.releases import is_prepared
from dynamo_tools.source import is_empty
from dynamo_tools.workspace import Package, Workspace, read_toml

GATE = "fragments"
_KINDS = "breaking|deprecated|added|changed|fixed|internal"
_NAME = re.compile(rf"(\d+|\+[a-z0-9][a-z0-9-]*)\.({_KINDS})(\.\d+)?\.md")


def check(workspace: Workspace) -> Iterator[Finding]:
    """Report fragments with wrong names or no text, changed sources without one, and hand-edited changelogs."""
    branch = branch_base(workspace)
    for package in workspace.packages:
        yield from _names(workspace, package)
        if is_empty(package.src):
            continue
        base = branch or release_base(workspace, package)
        changed = [path for path in changed_files(workspace, base) if _is_below(path, workspace, package)]
        released = branch is not None and _version_at(workspace, package, base) != package.version
        if not released and not is_prepared(workspace, package):
            yield from _changes(workspace, package, base, changed)


def _changes(workspace: Workspace, package: Package, base: Base, changed: list[str]) -> Iterator[Finding]:
    folder = workspace.relative(package.folder)
    sources = [path for path in changed if path.startswith(f"{folder}/src/")]
    fragments = [path for path in changed if path.startswith(f"{folder}/changes/") and path.endswith(".md")]
    if sources and not fragments:
        message = f"{len(sources)} files changed since {base.reason} without a fragment; add changes/+<slug>.<type>.md"
        yield Finding(folder, 1, GATE, f"{message}, the first is {sources[0]}")
    if f"{folder}/CHANGELOG.md" in changed and base.commit is not None:
        yield Finding(f"{folder}/CHANGELOG.md", 1, GATE, "edited outside a release; write a fragment instead")


def _names(workspace: Workspace, package: Package) -> Iterator[Finding]:
    folder = package.folder / "changes"
    if not folder.is_dir():
        yield Finding(workspace.relative(package.folder), 1, GATE, "folder changes/ is missing")
        return
    for path in sorted(folder.iterdir()):
        if path.name == ".gitignore":
            continue
        if not _NAME.fullmatch(path.name):
            message = f"name must be <number or +slug>.<{_KINDS.replace('|', ', ')}>.md"
            yield Finding(workspace.relative(path), 1, GATE, message)
        elif not path.read_text(encoding="utf-8").strip():
            yield Finding(workspace.relative(path), 1, GATE, "is empty; write one sentence for users")


def _is_below(path: str, workspace: Workspace, package: Package) -> bool:
    return PurePosixPath(path).is_relative_to(workspace.relative(package.folder))


def _version_at(workspace: Workspace, package: Package, base: Base) -> str:
    """Version at the base; the current one for a package that did not exist there."""
    text = workspace.git("show", f"{base.commit}:{workspace.relative(package.folder)}/pyproject.toml")
    if text is None:
        return package.version
    found = re.search(r'^version = "(.+)"$', text, re.MULTILINE)
    return found.group(1) if found else str(read_toml(package.folder / "pyproject.toml")["project"]["version"])
