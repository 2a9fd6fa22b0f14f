"""Golden wire files: what a release wrote is never edited, so that every later release is held to read it."""

from __future__ import annotations

from dynamo_tools.semver.change import Change, Level
from dynamo_tools.workspace import Package, Workspace


def compare(workspace: Workspace, package: Package, commit: str) -> list[Change]:
    """Golden files that differ from those of a commit."""
    folder = workspace.relative(package.folder)
    listed = workspace.git("ls-tree", "-r", "--format=%(objectname) %(path)", commit, f"{folder}/src") or ""
    pairs = [line.split(" ", 1) for line in listed.splitlines() if _is_golden(line)]
    old = {path: blob for blob, path in pairs}
    new = [workspace.relative(path) for path in workspace.files if path.is_relative_to(package.src)]
    added = [path for path in new if _is_golden(path) and path not in old]
    found = [Change(f"golden {path}", "is added", Level.MINOR) for path in added]
    for path, blob in old.items():
        if not (workspace.root / path).is_file():
            found.append(Change(f"golden {path}", "is removed", Level.MAJOR))
        elif (workspace.git("hash-object", path) or "").strip() != blob:
            found.append(Change(f"golden {path}", "is edited", Level.MAJOR))
    return sorted(found)


def _is_golden(path: str) -> bool:
    return "/golden/" in path and not path.endswith(".py")
