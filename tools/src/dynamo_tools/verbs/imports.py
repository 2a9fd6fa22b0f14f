"""``dyn imports``: what importing each package costs, in processor time, and how much it brings along."""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

from dynamo_tools.process import clean_environment, run
from dynamo_tools.table import table
from dynamo_tools.workspace import CORE, Package, Workspace

NAME = "imports"
SUMMARY = "measure the processor time of importing each package, against its budget"
BUDGET_S = 0.4
BUDGETS_S = {CORE: 0.15}
RUNS = 5
_PROGRAM = """
import time
begin = time.process_time()
import {name}
print(time.process_time() - begin)
"""


def add(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("--package", action="append", default=[], metavar="NAME", help="only this package; repeatable")
    parser.add_argument("--runs", type=int, default=RUNS, metavar="N", help=f"runs of each (default: {RUNS})")


def main(workspace: Workspace, arguments: argparse.Namespace) -> int:
    """Measure, and print a table; a median over its budget fails."""
    packages = [workspace.find(name) for name in arguments.package] or workspace.packages
    rows: list[tuple[str, str, str, str]] = []
    for package in packages:
        spent, budget = median_s(workspace, package, arguments.runs), budget_s(package)
        verdict = "ok" if spent <= budget else "over budget"
        rows.append((package.name, f"{spent * 1000:.0f} ms", f"{budget * 1000:.0f} ms", verdict))
    print(table(("import", f"median of {arguments.runs}, CPU", "budget", "result"), rows))
    return 1 if any(row[3] != "ok" for row in rows) else 0


def budget_s(package: Package) -> float:
    """Processor time that importing a package may take."""
    return BUDGETS_S.get(package.name, BUDGET_S)


def median_s(workspace: Workspace, package: Package, runs: int) -> float:
    """Median processor time of importing a package, each time in a fresh process; the first run fills the caches.

    Raises:
        LookupError: if the package does not import.
    """
    times: list[float] = []
    for _ in range(runs + 1):
        argv = [sys.executable, "-c", _PROGRAM.format(name=package.import_name)]
        result = run(argv, Path(workspace.root), env=clean_environment())
        if result.returncode:
            raise LookupError(f"{package.name} does not import: {result.tail(3)}")
        times.append(float(result.stdout))
    return statistics.median(times[1:])
