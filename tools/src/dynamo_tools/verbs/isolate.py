"""``dyn isolate``: test each package in an environment of its own, with only what it declares."""

from __future__ import annotations

import argparse
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat

from dynamo_tools.process import Result, clean_environment, run, tool
from dynamo_tools.table import table
from dynamo_tools.workspace import Package, Workspace

NAME = "isolate"
SUMMARY = "test every published package with its own dependencies alone"
_NO_TESTS_COLLECTED = 5


def add(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("--package", action="append", default=[], metavar="NAME", help="only this package; repeatable")
    parser.add_argument("--types", action="store_true", help="run pyright in place of the tests")
    parser.add_argument("--built", action="store_true", help="test the built package, not the source tree")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="packages at a time (default: 2)")


def main(workspace: Workspace, arguments: argparse.Namespace) -> int:
    """Test the packages; print the output of those that fail, and a table."""
    packages = [workspace.find(name) for name in arguments.package] or workspace.packages
    with ThreadPoolExecutor(arguments.jobs) as pool:
        outcomes = list(pool.map(_timed, repeat(workspace), packages, repeat(arguments)))
    rows: list[tuple[str, str, str]] = []
    for package, (result, seconds) in zip(packages, outcomes, strict=True):
        if result.returncode:
            print(f"{workspace.relative(package.folder)}:1: {NAME}: {_problem(result)}\n{result.text}")
        rows.append((package.name, _last_line(result), f"{seconds:.1f} s"))
    print(table(("package", "result", "time"), rows))
    return 1 if any(result.returncode for result, _ in outcomes) else 0


def command(workspace: Workspace, package: Package, *, types: bool, built: bool) -> list[str]:
    """The command line that tests one package, or checks its types, in isolation."""
    group = "typing" if types else "test"
    argv = [tool("uv"), "run", "--isolated", "--package", package.name, "--group", group]
    argv += ["--no-editable"] if built else []
    if types:
        # What ships as an extra for test authors is typed against that extra.
        argv += (
            ["--extra", "testing"] if "testing" in package.config["project"].get("optional-dependencies", {}) else []
        )
        return [*argv, "pyright", workspace.relative(package.src)]
    return [*argv, "pytest", workspace.relative(package.tests), "-q", "-p", "no:cacheprovider"]


def _timed(workspace: Workspace, package: Package, arguments: argparse.Namespace) -> tuple[Result, float]:
    started = time.monotonic()
    if not arguments.types and not package.tests.is_dir():
        return Result(_NO_TESTS_COLLECTED, "no tests", ""), 0.0
    argv = command(workspace, package, types=arguments.types, built=arguments.built)
    return run(argv, workspace.root, env=clean_environment()), time.monotonic() - started


def _problem(result: Result) -> str:
    return "no tests" if result.returncode == _NO_TESTS_COLLECTED else f"exit status {result.returncode}"


def _last_line(result: Result) -> str:
    lines = [line.strip("= ") for line in result.stdout.splitlines() if line.strip()]
    return lines[-1] if lines else _problem(result)
