"""``dyn affected``: which packages a change touches, as JSON for a workflow's matrix."""

from __future__ import annotations

import argparse
import json

from dynamo_tools.affected import affected_members
from dynamo_tools.changes import branch_base, changed_files
from dynamo_tools.workspace import Workspace

NAME = "affected"
SUMMARY = "print the published packages that the branch touches, as a JSON list"


def add(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("--all", action="store_true", help="every member, private ones included")


def main(workspace: Workspace, arguments: argparse.Namespace) -> int:
    """Print the names; all of them on the main branch, where there is nothing to compare with."""
    base = branch_base(workspace)
    names = [package.name for package in workspace.members]
    touched = set(names) if base is None else affected_members(workspace, changed_files(workspace, base))
    published = {package.name for package in workspace.packages}
    print(json.dumps([name for name in names if name in touched and (arguments.all or name in published)]))
    return 0
