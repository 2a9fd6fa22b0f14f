"""Planning, preparing, recording and verifying one release of one package."""

from __future__ import annotations

import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from dynamo_tools import surface
from dynamo_tools.gates.surface import DUMP
from dynamo_tools.process import Result, clean_environment, run, tool
from dynamo_tools.releases import Release, changelog_section, extract, record, releases
from dynamo_tools.semver import schemas
from dynamo_tools.semver.change import Level
from dynamo_tools.semver.judge import WAIVERS, fragments, judge
from dynamo_tools.wheels import build, inspect
from dynamo_tools.workspace import CORE, Package, Workspace


@dataclass(frozen=True)
class Plan:
    """What a release would be.

    Attributes:
        package: The package.
        previous: Its last version; None before the first release.
        version: The version it gets.
        level: What its fragments declare.
        refusals: Reasons not to release; empty if it can be.
    """

    package: Package
    previous: str | None
    version: str
    level: Level
    refusals: list[str]

    @property
    def tag(self) -> str:
        """Tag of the release."""
        return f"{self.package.name}-v{self.version}"


def plan(workspace: Workspace, package: Package) -> Plan:
    """Compute the next version, and why it must not be released yet.

    Raises:
        LookupError: if the last release cannot be read in this clone.
    """
    released = releases(workspace, package.name)
    last = released[-1].version if released else None
    verdict = judge(workspace, package)
    version = next_version(last, verdict.declared) if last else package.version
    return Plan(package, last, version, verdict.declared, list(_refusals(workspace, package, last)))


def next_version(last: str, level: Level) -> str:
    """The version after another; before 1.0 a break is a minor release."""
    old = Version(last)
    if level is Level.MAJOR and old.major:
        return f"{old.major + 1}.0.0"
    if level >= Level.MINOR:
        return f"{old.major}.{old.minor + 1}.0"
    return f"{old.major}.{old.minor}.{old.micro + 1}"


def prepare(workspace: Workspace, planned: Plan) -> list[str]:
    """Write version, changelog, lock and surface into the checkout; return what was done.

    Raises:
        LookupError: if the plan was refused, or a tool fails.
    """
    package, root = planned.package, workspace.root
    if planned.refusals:
        raise LookupError("; ".join(planned.refusals))
    folder = workspace.relative(package.folder)
    towncrier = [tool("towncrier"), "build", "--yes", "--config", "towncrier.toml", "--dir", folder]
    _must(run([*towncrier, "--version", planned.version], root))
    _must(run([tool("uv"), "version", "--package", package.name, "--frozen", planned.version], root))
    _must(run([tool("uv"), "lock"], root, env=clean_environment()))
    fresh = Workspace(root)
    package = fresh.find(package.name)
    (package.folder / DUMP).parent.mkdir(exist_ok=True)
    (package.folder / DUMP).write_text(surface.dump(package), encoding="utf-8")
    if described := schemas.dump(fresh, package):
        (package.folder / schemas.FILE).write_text(described, encoding="utf-8")
    (package.folder / WAIVERS).unlink(missing_ok=True)
    kept = package.folder / "changes" / ".gitignore"  # towncrier removes the last fragment, and git the empty folder
    kept.parent.mkdir(exist_ok=True)
    kept.write_text("!.gitignore\n", encoding="utf-8")
    done = [f"{folder}: version {planned.version}, changelog, api/ and uv.lock are written"]
    return [*done, f"commit it, then run: uv run dyn release record {package.name}"]


def record_head(workspace: Workspace, package: Package) -> Release:
    """Tag the commit that is checked out as the release of its version, and record it.

    Raises:
        LookupError: if the checkout is not a prepared release.
    """
    if workspace.git("status", "--porcelain"):
        raise LookupError("the checkout has changes; commit the release first")
    if not changelog_section(package, package.version):
        raise LookupError(
            f"the changelog of {package.name} says nothing of {package.version}; prepare the release first"
        )
    if package.version in {release.version for release in releases(workspace, package.name)}:
        raise LookupError(f"{package.name} {package.version} is released already")
    release = Release(package.name, package.version, (workspace.git("rev-parse", "HEAD") or "").strip())
    if workspace.git("tag", release.tag) is None:
        raise LookupError(f"tag {release.tag} cannot be made; it exists, or this is no clone")
    record(workspace, release)
    return release


def verify(workspace: Workspace, release: Release) -> Iterator[str]:
    """What is wrong with a release: rebuild it from its commit and look into the wheel."""
    if workspace.git("cat-file", "-e", f"{release.commit}^{{commit}}") is None:
        yield f"{release.tag}: commit {release.commit} is not in this clone; fetch all of it"
        return
    tagged = (workspace.git("rev-parse", "--verify", "--quiet", f"refs/tags/{release.tag}^{{commit}}") or "").strip()
    if tagged and tagged != release.commit:
        yield f"{release.tag}: the tag is at {tagged}, the record says {release.commit}"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "source"
        extract(workspace, release.commit, folder)
        then = Workspace(folder)
        package = then.find(release.package)
        if package.version != release.version:
            yield f"{release.tag}: the package has version {package.version} there"
        if not changelog_section(package, release.version):
            yield f"{release.tag}: the changelog says nothing of it"
        if fragments(package):
            yield f"{release.tag}: {len(fragments(package))} fragments are not in the changelog"
        yield from (f"{release.tag}: {refusal}" for refusal in _core_refusals(workspace, package))
        wheel = build(then, [package], Path(name) / "dist")[package.name]
        yield from (f"{release.tag}: {problem}" for problem in [*inspect(package, wheel), *_metadata(release, wheel)])


def core_range(package: Package) -> SpecifierSet | None:
    """Versions of core that a component allows; None for core itself."""
    for entry in package.config["project"].get("dependencies", []):
        requirement = Requirement(entry)
        if requirement.name == CORE:
            return requirement.specifier
    return None


def oldest_core(workspace: Workspace, package: Package) -> Release | None:
    """The oldest released core that a component allows."""
    allowed = core_range(package)
    if allowed is None:
        return None
    return next((release for release in releases(workspace, CORE) if Version(release.version) in allowed), None)


def _refusals(workspace: Workspace, package: Package, last: str | None) -> Iterator[str]:
    if not fragments(package):
        since = f"since {last}" if last else "yet"
        yield f"{package.name} has no fragments {since}; there is nothing to release"
    if last and package.version != last:
        yield f"{package.name} has version {package.version}, but {last} is its last release; releases set the version"
    verdict = judge(workspace, package)
    if not verdict.passes:
        yield f"{package.name} changed more than its fragments declare; see dyn semver {package.name}"
    yield from _core_refusals(workspace, package)


def _core_refusals(workspace: Workspace, package: Package) -> Iterator[str]:
    allowed = core_range(package)
    if allowed is None:
        return
    lower = next(Version(bound.version) for bound in allowed if bound.operator == ">=")
    versions = [Version(release.version) for release in releases(workspace, CORE)]
    if not any(version >= lower and version.release[:2] == lower.release[:2] for version in versions):
        yield f"{package.name} needs {CORE} {lower}, of which nothing is released; release {CORE} first"


def _metadata(release: Release, wheel: Path) -> Iterator[str]:
    with zipfile.ZipFile(wheel) as archive:
        name = next(item for item in archive.namelist() if item.endswith(".dist-info/METADATA"))
        words = archive.read(name).decode().split("\n\n")[0].splitlines()
    if f"Version: {release.version}" not in words or f"Name: {release.package}" not in words:
        yield f"{wheel.name} does not say {release.package} {release.version} in its metadata"


def _must(result: Result) -> None:
    if result.returncode:
        raise LookupError(result.tail())


def released_package(workspace: Workspace, tag: str) -> Release:
    """Return the release of a tag.

    Raises:
        LookupError: if there is none.
    """
    name, _, version = tag.rpartition("-v")
    for release in releases(workspace, name):
        if release.version == version:
            return release
    raise LookupError(f"no release {tag!r} is recorded or tagged")
