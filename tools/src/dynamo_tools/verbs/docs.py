"""``dyn docs``: build the site, with every warning an error, and look at it in a browser."""

from __future__ import annotations

import argparse
from pathlib import Path

from dynamo_tools.looking import look, photograph
from dynamo_tools.process import show, tool
from dynamo_tools.workspace import Workspace

NAME = "docs"
SUMMARY = "build the documentation site strictly into site/"


def add(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("--look", action="store_true", help="open every page in headless Chromium and judge its layout")
    parser.add_argument("--pictures", type=Path, metavar="FOLDER", help="write a picture of every page here")
    parser.add_argument("--publish", action="store_true", help="push the site to the branch of GitHub Pages")


def main(workspace: Workspace, arguments: argparse.Namespace) -> int:
    """Build in an environment of the documentation tools alone: pages are made from sources, not from imports."""
    argv = [tool("uv"), "run", "--isolated", "--only-group", "docs", "mkdocs"]
    action = ["gh-deploy", "--strict", "--force"] if arguments.publish else ["build", "--strict", "--quiet"]
    status = show([*argv, *action], workspace.root, {"NO_MKDOCS_2_WARNING": "1"})
    if status:
        return status
    print("docs: built site/ without warnings")
    site = workspace.root / "site"
    for picture in photograph(site, arguments.pictures) if arguments.pictures else ():
        print(picture)
    problems = look(site) if arguments.look else []
    print("\n".join(f"docs: {problem}" for problem in problems) or "docs: looks as it should" * arguments.look)
    return 1 if problems else 0
