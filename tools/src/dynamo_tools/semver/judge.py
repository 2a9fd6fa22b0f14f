"""The verdict on one package: what was found, what is declared, what is waived."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import griffe
from packaging.version import Version

from dynamo_tools import surface
from dynamo_tools.releases import Release, changelog_section, extract, previous
from dynamo_tools.semver import golden, lines, schemas
from dynamo_tools.semver.change import Change, Level
from dynamo_tools.workspace import Package, Workspace, read_toml

WAIVERS = "api/waivers.toml"
FRAGMENT_LEVELS = {
    "breaking": Level.MAJOR,
    "deprecated": Level.MINOR,
    "added": Level.MINOR,
    "changed": Level.MINOR,
    "fixed": Level.PATCH,
    "internal": Level.PATCH,
}
_OF_THE_DUMP = (griffe.BreakageKind.ATTRIBUTE_CHANGED_VALUE, griffe.BreakageKind.ATTRIBUTE_CHANGED_TYPE)


@dataclass(frozen=True)
class Verdict:
    """What the gate says of a package.

    Attributes:
        release: The release that it is compared with; None before the first.
        changes: All differences, waived ones left out.
        waived: Differences that a waiver covers.
        declared: What fragments and version admit.
        problems: Waivers that are wrong or unused.
    """

    release: Release | None
    changes: list[Change]
    waived: list[Change]
    declared: Level
    problems: list[str]

    @property
    def found(self) -> Level:
        """The biggest difference."""
        return max((change.level for change in self.changes), default=Level.NONE)

    @property
    def passes(self) -> bool:
        """Whether no more changed than is declared."""
        return self.release is None or (self.found <= self.declared and not self.problems)


def judge(workspace: Workspace, package: Package) -> Verdict:
    """Compare a package with its last release.

    Raises:
        LookupError: if the release cannot be read in this clone.
    """
    release = previous(workspace, package)
    if release is None:
        return Verdict(None, [], [], declared(package, None), [])
    with tempfile.TemporaryDirectory() as folder:
        relative = workspace.relative(package.folder)
        extract(workspace, release.commit, Path(folder), relative)
        old = Package(Path(folder) / relative, read_toml(Path(folder) / relative / "pyproject.toml"))
        changes = list(_changes(workspace, package, old, release.commit))
    waivers, problems = _waivers(package)
    unused = waivers - {change.fingerprint for change in changes}
    problems += [f"waiver {fingerprint} covers no change; remove it" for fingerprint in sorted(unused)]
    waived = [change for change in changes if change.fingerprint in waivers]
    kept = [change for change in changes if change.fingerprint not in waivers]
    return Verdict(release, kept, waived, declared(package, release), problems)


def declared(package: Package, release: Release | None) -> Level:
    """The level that the fragments declare, or the version where a release was prepared."""
    kinds = [path.name.split(".")[-2 if path.name.count(".") == 2 else 1] for path in fragments(package)]
    level = max((FRAGMENT_LEVELS.get(kind, Level.NONE) for kind in kinds), default=Level.NONE)
    if release is None or release.version == package.version:
        return level
    return max(level, _version_level(package, Version(release.version), Version(package.version)))


def fragments(package: Package) -> list[Path]:
    """Changelog fragments of a package."""
    return sorted(path for path in (package.folder / "changes").glob("*.md"))


def _version_level(package: Package, old: Version, new: Version) -> Level:
    if new.major != old.major:
        return Level.MAJOR
    if new.minor != old.minor:
        return Level.MAJOR if old.major == 0 and _admits_breaks(package) else Level.MINOR
    return Level.PATCH


def _admits_breaks(package: Package) -> bool:
    """Whether the changelog of this version lists breaks, which a minor release of 0.x may contain."""
    return "\n### Breaking" in changelog_section(package, package.version)


def _changes(workspace: Workspace, package: Package, old: Package, commit: str) -> Iterator[Change]:
    dumped = lines.compare(surface.dump(old), surface.dump(package))
    yield from dumped
    known = {_short(change.subject) for change in dumped if change.level is Level.MAJOR}
    for breakage in griffe.find_breaking_changes(_load(old), _load(package)):
        path = breakage.obj.path
        if breakage.kind not in _OF_THE_DUMP and _short(path) not in known:
            yield Change(path, f"{breakage.kind.value[:1].lower()}{breakage.kind.value[1:]}", Level.MAJOR)
    committed = workspace.git("show", f"{commit}:{workspace.relative(package.folder)}/{schemas.FILE}") or ""
    yield from schemas.compare(committed, schemas.dump(workspace, package))
    yield from golden.compare(workspace, package, commit)


def _load(package: Package) -> griffe.Object | griffe.Alias:
    return griffe.load(package.import_name, search_paths=[package.src.parent], allow_inspection=False)


def _short(path: str) -> str:
    """Last two parts of a dotted name, by which a name and the place it is defined at are recognised as one."""
    return ".".join(path.split(".")[-2:])


def _waivers(package: Package) -> tuple[set[str], list[str]]:
    path = package.folder / WAIVERS
    entries = read_toml(path).get("waiver", []) if path.is_file() else []
    problems = [
        f"waiver {entry.get('fingerprint', '?')} gives no reason"
        for entry in entries
        if not str(entry.get("reason", "")).strip()
    ]
    return {str(entry.get("fingerprint", "?")) for entry in entries}, problems
