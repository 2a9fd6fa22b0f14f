"""``dyn readme``: run every Python block of the READMEs and pages, and try every command of the product in them."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from dynamo_tools.documented import commands, problems
from dynamo_tools.examples import run_blocks
from dynamo_tools.workspace import Workspace

NAME = "readme"
SUMMARY = "run the python blocks of READMEs and documentation pages in this environment, and try their commands"


def add(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE", help="only these Markdown files")


def main(workspace: Workspace, arguments: argparse.Namespace) -> int:
    """Run the blocks; print those that fail with their output."""
    files = [path.resolve() for path in arguments.files] or pages(workspace)
    ran = failed = 0
    for path in files:
        for block in run_blocks(path, Path(sys.executable)):
            ran += 1
            if block.result.returncode:
                failed += 1
                print(f"{workspace.relative(path)}:{block.line}: {NAME}: {block.result.tail()}")
    found = [command for path in files for command in commands(workspace, path)]
    refused = list(problems(found))
    for command, problem in refused:
        print(f"{workspace.relative(command.path)}:{command.line}: {NAME}: {problem}")
    print(f"{NAME}: ran {ran} blocks of {len(files)} files, {failed} failed")
    print(f"{NAME}: tried {len(found)} commands, {len(refused)} are not accepted")
    return 1 if failed or refused else 0


def pages(workspace: Workspace) -> list[Path]:
    """The READMEs of the root and the members, and every page of the site."""
    names = ("README.md", "CONTRIBUTING.md")
    docs = workspace.root / "docs"
    return [path for path in workspace.files if path.name in names or (path.suffix == ".md" and docs in path.parents)]
