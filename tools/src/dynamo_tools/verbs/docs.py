"""``dyn docs``: build the site, with every warning an error."""

from __future__ import annotations

import argparse

from dynamo_tools.process import show, tool
from dynamo_tools.workspace import Workspace

NAME = "docs"
SUMMARY = "build the documentation site strictly into site/"


def add(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("--publish", action="store_true", help="push the site to the branch of GitHub Pages")


def main(workspace: Workspace, arguments: argparse.Namespace) -> int:
    """Build in an environment of the documentation tools alone: pages are made from sources, not from imports."""
    argv = [tool("uv"), "run", "--isolated", "--only-group", "docs", "mkdocs"]
    action = ["gh-deploy", "--strict", "--force"] if arguments.publish else ["build", "--strict", "--quiet"]
    status = show([*argv, *action], workspace.root, {"NO_MKDOCS_2_WARNING": "1"})
    if status == 0:
        print("docs: built site/ without warnings")
    return status
