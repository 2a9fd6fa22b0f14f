"""``dyn release``: plan, prepare, record and verify the release of one package."""

from __future__ import annotations

import argparse

from dynamo_tools.releases import FILE, Release, changelog_section, releases
from dynamo_tools.releasing import Plan, plan, prepare, record_head, released_package, verify
from dynamo_tools.semver.judge import fragments
from dynamo_tools.workspace import Workspace

NAME = "release"
SUMMARY = "plan, prepare, record or verify the release of one package, or print its notes"
ACTIONS = {
    "plan": "show the next version and what stands against it",
    "prepare": "write version, changelog, lock and api/ into the checkout",
    "record": f"tag the commit that is checked out, and add it to {FILE}",
    "verify": "rebuild recorded releases from their commits and look into them",
    "notes": "print the changelog of a version",
}


def add(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    described = "; ".join(f"{name}: {text}" for name, text in ACTIONS.items())
    parser.add_argument("action", choices=tuple(ACTIONS), metavar="ACTION", help=described)
    parser.add_argument("package", nargs="?", metavar="PACKAGE", help="the package; verify takes all without it")
    parser.add_argument("--tag", default="", help="the release of this tag, for verify and notes")


def main(workspace: Workspace, arguments: argparse.Namespace) -> int:
    """Do one action."""
    if arguments.action == "verify":
        return _verify(workspace, _chosen(workspace, arguments))
    if arguments.action == "notes" and arguments.tag:
        name = released_package(workspace, arguments.tag)
        print(changelog_section(workspace.find(name.package), name.version), end="")
        return 0
    if not arguments.package:
        raise LookupError(f"release {arguments.action} needs a package")
    package = workspace.find(arguments.package)
    if arguments.action == "record":
        release = record_head(workspace, package)
        print(f"{release.tag} is {release.commit}; commit {FILE}")
    elif arguments.action == "notes":
        print(changelog_section(package, package.version), end="")
    else:
        planned = plan(workspace, package)
        print("\n".join(describe(planned) if arguments.action == "plan" else prepare(workspace, planned)))
        return 1 if planned.refusals else 0
    return 0


def describe(planned: Plan) -> list[str]:
    """Lines that show a plan."""
    name = planned.package.name
    lines = [f"{name}: {planned.previous or 'no release'} -> {planned.version} ({planned.level}), tag {planned.tag}"]
    lines += [f"  {path.name}: {path.read_text(encoding='utf-8').strip()}" for path in fragments(planned.package)]
    return lines + [f"refused: {refusal}" for refusal in planned.refusals]


def _chosen(workspace: Workspace, arguments: argparse.Namespace) -> list[Release]:
    if arguments.tag:
        return [released_package(workspace, arguments.tag)]
    packages = [workspace.find(arguments.package)] if arguments.package else workspace.packages
    return [release for package in packages for release in releases(workspace, package.name)]


def _verify(workspace: Workspace, chosen: list[Release]) -> int:
    problems = 0
    for release in chosen:
        found = list(verify(workspace, release))
        problems += len(found)
        print("\n".join(found) or f"{release.tag}: rebuilds from {release.commit[:12]}")
    if not chosen:
        print("release: no release yet, so nothing to verify")
    return 1 if problems else 0
