"""Every requirement has a lower bound, and every component takes one major version of core."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from packaging.requirements import Requirement
from packaging.version import Version

from dynamo_tools.finding import Finding
from dynamo_tools.workspace import CORE, Package, Workspace

GATE = "ranges"
_LOWER = {">=", "~=", "==", ">"}


def check(workspace: Workspace) -> Iterator[Finding]:
    """Report requirements without a lower bound and wrong ranges of core."""
    members = {package.name for package in workspace.members}
    root = Package(workspace.root, workspace.config)
    for package in [root, *workspace.members]:
        path = workspace.relative(package.folder / "pyproject.toml")
        published = package in workspace.packages
        for entry in _entries(package.config):
            requirement = Requirement(entry)
            if requirement.name in members and not published:
                continue  # a private member always takes its neighbours from the workspace
            if requirement.name == package.config["project"]["name"]:
                continue  # an extra that gathers other extras of the same distribution
            if not any(specifier.operator in _LOWER for specifier in requirement.specifier):
                yield Finding(path, 1, GATE, f"{entry!r} has no lower bound; write the oldest version that is tested")
    for package in workspace.components:
        yield from _core_range(workspace, package)


def _entries(config: dict[str, Any]) -> Iterator[str]:
    project = config.get("project", {})
    yield from project.get("dependencies", [])
    for entries in project.get("optional-dependencies", {}).values():
        yield from entries
    for entries in config.get("dependency-groups", {}).values():
        yield from (entry for entry in entries if isinstance(entry, str))
    yield from config.get("build-system", {}).get("requires", [])


def _core_range(workspace: Workspace, package: Package) -> Iterator[Finding]:
    path = workspace.relative(package.folder / "pyproject.toml")
    found = [Requirement(entry) for entry in package.config["project"].get("dependencies", [])]
    ranges = [requirement for requirement in found if requirement.name == CORE]
    if len(ranges) != 1:
        yield Finding(path, 1, GATE, f"{package.name} must require {CORE} exactly once, as {CORE}>=1.0,<2")
        return
    bounds = {specifier.operator: specifier.version for specifier in ranges[0].specifier}
    if set(bounds) != {">=", "<"}:
        yield Finding(path, 1, GATE, f"range of {CORE} is {ranges[0].specifier}; write >=MAJOR.MINOR,<NEXT MAJOR")
        return
    low, high = Version(bounds[">="]), Version(bounds["<"])
    if low.major < 1 or high != Version(str(low.major + 1)):
        yield Finding(
            path, 1, GATE, f"range of {CORE} is {ranges[0].specifier}; write >={low},<{max(low.major, 1) + 1}"
        )
    core = workspace.core
    if core is not None and not low <= Version(core.version) < high:
        yield Finding(path, 1, GATE, f"range of {CORE} is {ranges[0].specifier}; the workspace has {core.version}")
