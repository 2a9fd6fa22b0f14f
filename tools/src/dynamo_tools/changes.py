"""What changed in this checkout, and since when."""

from __future__ import annotations

from dataclasses import dataclass

from dynamo_tools.releases import releases
from dynamo_tools.workspace import Package, Workspace

_MAIN = ("origin/main", "main")


@dataclass(frozen=True)
class Base:
    """The commit that changes are counted from.

    Attributes:
        commit: Commit or tag; None for the beginning of the repository.
        reason: What it is, for messages.
    """

    commit: str | None
    reason: str


def branch_base(workspace: Workspace) -> Base | None:
    """Where this branch left the main branch; None on the main branch itself, or where there is none."""
    head = (workspace.git("rev-parse", "HEAD") or "").strip()
    for name in _MAIN:
        commit = (workspace.git("merge-base", "HEAD", name) or "").strip()
        if commit:
            dirty = bool((workspace.git("status", "--porcelain") or "").strip())
            return Base(commit, f"{name}") if commit != head or dirty else None
    return None


def release_base(workspace: Workspace, package: Package) -> Base:
    """The last release of a package, from ``releases.toml`` or its tags."""
    found = releases(workspace, package.name)
    return Base(found[-1].commit, found[-1].tag) if found else Base(None, "its first release")


def changed_files(workspace: Workspace, base: Base) -> list[str]:
    """Files that differ from the base, uncommitted and untracked ones included, relative to the root."""
    if base.commit is None:
        return [workspace.relative(path) for path in workspace.files]
    tracked = workspace.git("diff", "--name-only", base.commit, "--") or ""
    untracked = workspace.git("ls-files", "-o", "--exclude-standard") or ""
    return sorted({*tracked.splitlines(), *untracked.splitlines()})
