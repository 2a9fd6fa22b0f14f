"""``dyn semver``: no package changes more than its fragments and version declare."""

from __future__ import annotations

import argparse

from dynamo_tools.semver.judge import WAIVERS, Verdict, judge
from dynamo_tools.workspace import Package, Workspace

NAME = "semver"
SUMMARY = "compare each package with its own last release, and with what its fragments and version declare"
SHOWN = 40


def add(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("package", nargs="*", metavar="PACKAGE", help="only these packages")
    parser.add_argument(
        "--all", action="store_true", help="show every difference, not only those beyond what is declared"
    )


def main(workspace: Workspace, arguments: argparse.Namespace) -> int:
    """Judge the packages; print what each one changed beyond what it declares."""
    packages = [workspace.find(name) for name in arguments.package] or workspace.packages
    failed = False
    for package in packages:
        verdict = judge(workspace, package)
        for line in report(package, verdict, everything=arguments.all):
            print(line)
        failed = failed or not verdict.passes
    return 1 if failed else 0


def report(package: Package, verdict: Verdict, *, everything: bool = False) -> list[str]:
    """Lines that say what was found."""
    if verdict.release is None:
        return [f"{package.name}: no release yet, so nothing to compare with"]
    shown = [change for change in verdict.changes if everything or change.level > verdict.declared]
    lines = [f"{package.name}: {change}" for change in shown[:SHOWN]]
    lines += [f"{package.name}: and {len(shown) - SHOWN} more"] if len(shown) > SHOWN else []
    lines += [f"{package.name}: {problem}" for problem in verdict.problems]
    found = f"{len(verdict.changes)} differences from {verdict.release.tag}, found {verdict.found}"
    lines.append(f"{package.name}: {found}, declared {verdict.declared}, {len(verdict.waived)} waived")
    if verdict.found > verdict.declared:
        remedy = f"declare it in changes/, or waive it by its fingerprint in {WAIVERS} with a reason"
        lines.append(f"{package.name}: fails: {remedy}")
    return lines
