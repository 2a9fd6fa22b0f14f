"""``dyn compat``: the checkout beside the last release of everything else."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from pathlib import Path

from dynamo_tools.compat.environments import Environments
from dynamo_tools.compat.legs import run_leg
from dynamo_tools.compat.matrix import ClusterLeg, Leg, TestLeg, WireLeg, legs
from dynamo_tools.table import table
from dynamo_tools.workspace import Workspace

NAME = "compat"
SUMMARY = "try the checkout with the last releases: their tests, golden files both ways, mixed clusters"
KINDS = {"tests": TestLeg, "wire": WireLeg, "cluster": ClusterLeg}


def add(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("--only", choices=tuple(KINDS), action="append", help="only this kind of leg; repeatable")
    parser.add_argument("--list", action="store_true", help="print the legs and run none")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="legs at a time (default: 2)")


def main(workspace: Workspace, arguments: argparse.Namespace) -> int:
    """Run the legs; print what went wrong, and a table."""
    wanted = {KINDS[name] for name in arguments.only or KINDS}
    chosen = [leg for leg in legs(workspace) if type(leg) in wanted]
    if not chosen:
        print("compat: no release yet, so nothing to be compatible with")
        return 0
    if arguments.list:
        print("\n".join(map(str, chosen)))
        return 0
    with tempfile.TemporaryDirectory(prefix="dynamo-compat-") as folder:
        environments = Environments(workspace, Path(folder))
        with ThreadPoolExecutor(arguments.jobs) as pool:
            outcomes = list(pool.map(_timed, repeat(environments), chosen))
    rows: list[tuple[str, str, str]] = []
    for leg, (problem, seconds) in zip(chosen, outcomes, strict=True):
        if problem:
            print(f"compat: {leg}: {problem}")
        rows.append((str(leg), "failed" if problem else "ok", f"{seconds:.1f} s"))
    print(table(("leg", "result", "time"), rows))
    return 1 if any(row[1] == "failed" for row in rows) else 0


def _timed(environments: Environments, leg: Leg) -> tuple[str | None, float]:
    started = time.monotonic()
    problem = run_leg(environments, leg)
    seconds = time.monotonic() - started
    # The whole takes minutes: whoever waits sees each leg as it ends, beside the report and not in it.
    print(f"compat: {leg}: {'failed' if problem else 'ok'} after {seconds:.0f} s", file=sys.stderr, flush=True)
    return problem, seconds
