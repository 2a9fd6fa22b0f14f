"""``dyn wheels``: build every wheel and try each with core alone."""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from pathlib import Path

from dynamo_tools.table import table
from dynamo_tools.wheels import Trial, build, inspect, try_out
from dynamo_tools.workspace import CORE, Package, Workspace

NAME = "wheels"
SUMMARY = "build the wheels, check their contents, and run each README example with only core and that wheel installed"


def add(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("--package", action="append", default=[], metavar="NAME", help="only this package; repeatable")
    parser.add_argument("--tag", default="", help="only the package of this release tag, dynamo-<name>-v<version>")
    parser.add_argument(
        "--python", default="", metavar="VERSION", help="Python of the environments (default: this one)"
    )
    parser.add_argument(
        "--resolution", default="highest", choices=("highest", "lowest-direct"), help="versions of the dependencies"
    )
    parser.add_argument("--out-dir", type=Path, metavar="FOLDER", help="copy the wheels of the packages here")


def main(workspace: Workspace, arguments: argparse.Namespace) -> int:
    """Build and try; print what is wrong, and a table."""
    packages = [workspace.find(name) for name in arguments.package] or workspace.packages
    if arguments.tag:
        packages = [released(workspace, arguments.tag)]
    trial = Trial(arguments.python, arguments.resolution)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        core = [package for package in [workspace.core] if package and package not in packages]
        wheels = build(workspace, [*core, *packages], folder / "wheels")
        rows: list[tuple[str, str, str, str]] = []
        for package in packages:
            started = time.monotonic()
            problems = _problems(workspace, package, wheels, folder / package.name, trial)
            for problem in problems:
                print(f"{workspace.relative(package.folder)}:1: {NAME}: {problem}")
            size = f"{wheels[package.name].stat().st_size / 1000:.0f} kB"
            if arguments.out_dir:
                arguments.out_dir.mkdir(parents=True, exist_ok=True)
                shutil.copy(wheels[package.name], arguments.out_dir)
            rows.append((package.name, size, "failed" if problems else "ok", f"{time.monotonic() - started:.1f} s"))
    print(table(("wheel", "size", f"with {CORE} alone", "time"), rows))
    return 1 if any(row[2] == "failed" for row in rows) else 0


def released(workspace: Workspace, tag: str) -> Package:
    """Return the package of a release tag.

    Raises:
        LookupError: if the tag names no package, or another version than the package has.
    """
    name, _, version = tag.rpartition("-v")
    package = workspace.find(name)
    if package.version != version:
        raise LookupError(f"tag {tag} names version {version!r}; {package.name} has {package.version}")
    return package


def _problems(workspace: Workspace, package: Package, wheels: dict[str, Path], folder: Path, trial: Trial) -> list[str]:
    problem = try_out(workspace, package, wheels, folder, trial)
    return [*inspect(package, wheels[package.name]), *([problem] if problem else [])]
