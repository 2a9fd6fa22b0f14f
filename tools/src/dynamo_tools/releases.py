"""The releases of each package, from ``releases.toml`` and from tags.

The file lets a clone without tags find, and rebuild, every release. A release is recorded by the commit after its own,
since a commit cannot name itself.
"""

from __future__ import annotations

import io
import re
import tarfile
from dataclasses import dataclass
from pathlib import Path

from packaging.version import InvalidVersion, Version

from dynamo_tools.process import run_bytes
from dynamo_tools.workspace import Package, Workspace, read_toml

FILE = "releases.toml"
HEADER = (
    "# Every release: package, version, commit. Written by `uv run dyn release record`; entries are never edited.\n"
)


@dataclass(frozen=True)
class Release:
    """One release of one package."""

    package: str
    version: str
    commit: str

    @property
    def tag(self) -> str:
        """Name of its tag."""
        return f"{self.package}-v{self.version}"


def releases(workspace: Workspace, package: str) -> list[Release]:
    """Releases of a package, oldest version first; the file decides where a tag says otherwise."""
    found = {**_tagged(workspace, package), **_recorded(workspace, package)}
    return [Release(package, version, found[version]) for version in sorted(found, key=Version)]


def previous(workspace: Workspace, package: Package) -> Release | None:
    """The last release that is not this very commit; None before the first.

    Raises:
        LookupError: if its commit is not in this clone.
    """
    head = (workspace.git("rev-parse", "HEAD") or "").strip()
    before = [release for release in releases(workspace, package.name) if release.commit != head]
    if not before:
        return None
    if workspace.git("cat-file", "-e", f"{before[-1].commit}^{{commit}}") is None:
        raise LookupError(f"commit {before[-1].commit} of {before[-1].tag} is not in this clone; fetch all of it")
    return before[-1]


def changelog_section(package: Package, version: str) -> str:
    """What the changelog says of a version, its heading included; empty if it says nothing."""
    text = (package.folder / "CHANGELOG.md").read_text(encoding="utf-8")
    found = re.search(rf"^## {re.escape(version)} .*?(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    return found[0].strip() + "\n" if found else ""


def is_prepared(workspace: Workspace, package: Package) -> bool:
    """Whether the checkout holds a release of the package that is not recorded yet."""
    recorded = {release.version for release in releases(workspace, package.name)}
    return package.version not in recorded and bool(changelog_section(package, package.version))


def record(workspace: Workspace, release: Release) -> None:
    """Append a release to the file."""
    path = workspace.root / FILE
    text = path.read_text(encoding="utf-8") if path.is_file() else HEADER
    entry = f'package = "{release.package}"\nversion = "{release.version}"\ncommit = "{release.commit}"\n'
    path.write_text(f"{text}\n[[release]]\n{entry}", encoding="utf-8")


def extract(workspace: Workspace, commit: str, folder: Path, *paths: str) -> None:
    """Write files of a commit into a folder, all of them or those below the paths.

    Raises:
        LookupError: if the commit or a path is not there.
    """
    result = run_bytes(["git", "archive", "--format=tar", commit, "--", *paths], workspace.root)
    if result is None:
        raise LookupError(f"commit {commit} has no {' '.join(paths) or 'files'} in this clone; fetch all of it")
    with tarfile.open(fileobj=io.BytesIO(result)) as archive:
        archive.extractall(folder, filter="data")


def _recorded(workspace: Workspace, package: str) -> dict[str, str]:
    path = workspace.root / FILE
    entries = read_toml(path).get("release", []) if path.is_file() else []
    return {str(entry["version"]): str(entry["commit"]) for entry in entries if entry["package"] == package}


def _tagged(workspace: Workspace, package: str) -> dict[str, str]:
    listed = workspace.git("for-each-ref", "--format=%(refname:short) %(objectname) %(*objectname)", "refs/tags")
    found: dict[str, str] = {}
    for line in (listed or "").splitlines():
        tag, *commits = line.split()
        prefix, _, version = tag.rpartition("-v")
        if prefix == package and _is_version(version):
            found[version] = commits[-1]
    return found


def _is_version(text: str) -> bool:
    try:
        Version(text)
    except InvalidVersion:
        return False
    return True
