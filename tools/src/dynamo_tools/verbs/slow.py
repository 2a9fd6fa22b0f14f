"""``dyn slow``: the adapters on real engines."""

from __future__ import annotations

import argparse
import os
import platform
from pathlib import Path

from dynamo_tools.process import show
from dynamo_tools.slow.environment import Environment
from dynamo_tools.slow.jobs import JOBS
from dynamo_tools.workspace import Workspace

NAME = "slow"
SUMMARY = "run the tests on a real engine, in an environment of its own; takes minutes and gigabytes"
_NO_TESTS = 5  # pytest's status when nothing was selected
CACHE = Path.home() / ".cache" / "dynamo-slow"


def add(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("job", choices=sorted(JOBS), help="which engine")
    parser.add_argument(
        "--environments", type=Path, default=CACHE, metavar="DIR", help=f"kept there (default: {CACHE})"
    )
    links = os.environ.get("PIP_FIND_LINKS", "")
    parser.add_argument("--find-links", default=links, metavar="DIR", help="further wheels, such as torch for CPUs")
    parser.add_argument("--select", default="", metavar="EXPRESSION", help="only these tests, as pytest's -k takes it")
    parser.add_argument("--no-install", action="store_true", help="use the environment as it is")


def main(workspace: Workspace, arguments: argparse.Namespace) -> int:
    """Install, print the versions, run the tests; return pytest's status."""
    job = JOBS[arguments.job]
    environment = Environment(arguments.environments, job, arguments.find_links)
    if not arguments.no_install:
        environment.install(workspace)
    print(f"Python {platform.python_version()}", *environment.versions(), sep="\n", flush=True)
    scope = [f"asyncio_default_{kind}_loop_scope=session" for kind in ("test", "fixture")]
    options = [item for name in scope for item in ("-o", name)]
    select = ["-k", arguments.select] if arguments.select else []
    status = 0
    for test in job.tests:  # a process each, since an engine gives its memory back only with its process
        argv = [
            str(environment.python),
            "-m",
            "pytest",
            "-m",
            "slow",  # an ordinary run leaves them out, by the workspace's own pytest options
            "-W",
            "default",
            "-q",
            "-rA",
            "-m",
            "slow",
            "-p",
            "no:cacheprovider",
            *options,
        ]
        code = show([*argv, *select, test], workspace.root, environment.variables(workspace))
        status = status or (0 if code == _NO_TESTS and select else code)
    return status
