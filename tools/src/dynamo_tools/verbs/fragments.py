"""``dyn fragments``: what the next release of each package would tell its users."""

from __future__ import annotations

import argparse

from dynamo_tools.gates.fragments import check
from dynamo_tools.semver.judge import fragments
from dynamo_tools.workspace import Package, Workspace

NAME = "fragments"
SUMMARY = "show the changelog fragments that wait for the next release of each package, and what is wrong with them"


def add(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("--package", action="append", default=[], metavar="NAME", help="only this package; repeatable")


def main(workspace: Workspace, arguments: argparse.Namespace) -> int:
    """Print them by package; return 1 if the gate of the same name finds anything in those packages."""
    packages = [workspace.find(name) for name in arguments.package] or list(workspace.packages)
    for package in packages:
        print("\n".join(_waiting(package)))
    folders = tuple(f"{workspace.relative(package.folder)}/" for package in packages)
    findings = [finding for finding in check(workspace) if f"{finding.path}/".startswith(folders)]
    if findings:
        print("\n".join(str(finding) for finding in findings))
    return 1 if findings else 0


def _waiting(package: Package) -> list[str]:
    found = fragments(package)
    if not found:
        return [f"{package.name} {package.version}: nothing waits"]
    lines = [f"  {path.name}: {path.read_text(encoding='utf-8').strip()}" for path in found]
    return [f"{package.name} {package.version}: {len(found)} wait", *lines]
