"""``dyn bench``: run one benchmark."""

from __future__ import annotations

import argparse

from dynamo_tools.bench import NAMES, Options, load, report
from dynamo_tools.workspace import Workspace

NAME = "bench"
SUMMARY = "run a benchmark and print its figures"


def add(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("name", metavar="NAME", choices=NAMES, help=", ".join(NAMES))
    parser.add_argument("--quick", action="store_true", help="fewer and shorter runs; rough figures")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")


def main(workspace: Workspace, arguments: argparse.Namespace) -> int:
    """Run it and print the figures."""
    figures = load(arguments.name)(Options(workspace.root, quick=arguments.quick))
    print(report.json_lines(figures) if arguments.json else report.text(figures))
    return 0
