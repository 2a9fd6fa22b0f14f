"""``dyn surface``: show, check or write the dumps of the public surface."""

from __future__ import annotations

import argparse

from dynamo_tools.gates.surface import DUMP, check
from dynamo_tools.semver import schemas
from dynamo_tools.surface import dump
from dynamo_tools.workspace import Workspace

NAME = "surface"
SUMMARY = (
    "print the public surface of packages, compare it with api/public.txt, or write that file and api/schemas.json"
)


def add(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    action = parser.add_mutually_exclusive_group()
    action.add_argument(
        "--write", action="store_true", help="write api/public.txt and api/schemas.json of the packages"
    )
    action.add_argument("--check", action="store_true", help="report every line that differs from api/public.txt")
    parser.add_argument("--package", action="append", default=[], metavar="NAME", help="only this package; repeatable")


def main(workspace: Workspace, arguments: argparse.Namespace) -> int:
    """Do what is asked; printing is the default."""
    if arguments.check:
        findings = list(check(workspace))
        print("\n".join(str(finding) for finding in findings) or "surface: no difference")
        return 1 if findings else 0
    for package in [workspace.find(name) for name in arguments.package] or workspace.packages:
        text = dump(package)
        if arguments.write:
            path = package.folder / DUMP
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
            print(f"{workspace.relative(path)}: {len(text.splitlines()) - 1} lines")
            if described := schemas.dump(workspace, package):
                (package.folder / schemas.FILE).write_text(described, encoding="utf-8")
        else:
            print(text, end="")
    return 0
