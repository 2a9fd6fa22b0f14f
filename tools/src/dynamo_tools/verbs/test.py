"""``dyn test``: pytest from the root."""

from __future__ import annotations

import argparse

from dynamo_tools.affected import affected_members
from dynamo_tools.changes import branch_base, changed_files
from dynamo_tools.process import show, tool
from dynamo_tools.workspace import Package, Workspace

NAME = "test"
SUMMARY = "run the tests of all members, of some, or of those that the branch touches"


def add(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("--package", action="append", default=[], metavar="NAME", help="only this member; repeatable")
    parser.add_argument("--affected", action="store_true", help="only members that the branch touches")
    parser.add_argument("--jobs", "-n", default="2", metavar="N", help="processes (default: 2; 0 for none)")
    parser.add_argument("--markers", "-m", default="", metavar="EXPRESSION", help="pytest's marker expression")


def main(workspace: Workspace, arguments: argparse.Namespace) -> int:
    """Run pytest in this environment."""
    members = chosen(workspace, arguments.package, affected=arguments.affected)
    folders = [workspace.relative(package.tests) for package in members if package.tests.is_dir()]
    if not folders:
        print("no tests to run: no member with tests is touched")
        return 0
    markers = ["-m", arguments.markers] if arguments.markers else []
    return show([tool("pytest"), "-q", "-n", arguments.jobs, *markers, *folders], workspace.root)


def chosen(workspace: Workspace, names: list[str], *, affected: bool = False) -> list[Package]:
    """Members by name, or those that the branch touches, or all.

    Raises:
        LookupError: for a name that is no member.
    """
    if names:
        return [workspace.find(name) for name in names]
    base = branch_base(workspace) if affected else None
    if base is None:
        return workspace.members
    touched = affected_members(workspace, changed_files(workspace, base))
    return [package for package in workspace.members if package.name in touched]
