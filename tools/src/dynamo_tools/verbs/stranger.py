"""``dyn stranger``: a clone, one package and core alone, a break and its release."""

from __future__ import annotations

import argparse
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from pathlib import Path

from dynamo_tools.stranger import alone, changed, clone
from dynamo_tools.table import table
from dynamo_tools.workspace import Package, Workspace

NAME = "stranger"
SUMMARY = "in a clone: install, test, build and read each package with core alone; break one, declare it, release it"
BROKEN = "dynamo-router"


def add(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("--package", action="append", default=[], metavar="NAME", help="only this package; repeatable")
    parser.add_argument("--no-tests", action="store_true", help="leave the packages' tests out")
    parser.add_argument("--broken", default=BROKEN, metavar="NAME", help=f"package that is changed (default: {BROKEN})")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="packages at a time (default: 2)")


def main(workspace: Workspace, arguments: argparse.Namespace) -> int:
    """Do what a stranger does; print what goes wrong, and a table."""
    rows: list[tuple[str, str, str, str]] = []
    with tempfile.TemporaryDirectory(prefix="dynamo-stranger-") as name:
        folder = Path(name)
        cloned = clone(workspace, folder / "clone")
        names = [workspace.find(item).name for item in arguments.package]
        packages = [cloned.find(item) for item in names] or cloned.packages
        with ThreadPoolExecutor(arguments.jobs) as pool:
            tests = repeat(not arguments.no_tests)
            outcomes = list(pool.map(_alone, repeat(cloned), packages, repeat(folder), tests))
        for package, (problems, seconds) in zip(packages, outcomes, strict=True):
            rows.append(_row(package.name, "installed, tested, built and read", problems, seconds))
        broken = cloned.find(workspace.find(arguments.broken).name)
        started = time.monotonic()
        problems = list(changed(cloned, broken))
        rows.append(_row(broken.name, "broken, declared and released", problems, time.monotonic() - started))
    print(table(("package", "what", "result", "time"), rows))
    return 1 if any(row[2] == "failed" for row in rows) else 0


def _row(name: str, what: str, problems: list[str], seconds: float) -> tuple[str, str, str, str]:
    for problem in problems:
        print(f"packages/{name}:1: {NAME}: {problem}")
    return name, what, "failed" if problems else "ok", f"{seconds:.1f} s"


def _alone(cloned: Workspace, package: Package, folder: Path, tests: bool) -> tuple[list[str], float]:
    started = time.monotonic()
    place = folder / package.name
    place.mkdir()
    return list(alone(cloned, package, place, tests=tests)), time.monotonic() - started
