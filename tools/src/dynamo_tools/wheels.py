"""Building wheels, looking into them, and trying them in empty environments."""

from __future__ import annotations

import sys
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from dynamo_tools.examples import run_blocks, run_code
from dynamo_tools.process import clean_environment, run, tool
from dynamo_tools.workspace import CORE, Package, Workspace

SIZE_LIMIT_BYTES = 600_000
SIZE_LIMITS_BYTES = {"dynamo-worker": 4_000_000}
"""The worker ships a small model for its reference engine."""


@dataclass(frozen=True)
class Trial:
    """Where and how a wheel is tried.

    Attributes:
        python: Python version or interpreter of the environment; empty for the one that runs ``dyn``.
        resolution: uv's resolution: ``highest`` or ``lowest-direct``.
    """

    python: str = ""
    resolution: str = "highest"


def build(workspace: Workspace, packages: Sequence[Package], folder: Path) -> dict[str, Path]:
    """Build wheels; return the file of each distribution.

    Raises:
        LookupError: if one does not build; the message is the builder's.
    """
    built: dict[str, Path] = {}
    for package in packages:
        argv = [tool("uv"), "build", "--wheel", "--package", package.name, "--out-dir", str(folder), "--quiet"]
        result = run(argv, workspace.root, env=clean_environment())
        if result.returncode:
            raise LookupError(f"{package.name} does not build:\n{result.tail()}")
        built[package.name] = next(folder.glob(f"{package.import_name}-*.whl"))
    return built


def inspect(package: Package, wheel: Path) -> Iterator[str]:
    """What is wrong with the content of a wheel."""
    limit = SIZE_LIMITS_BYTES.get(package.name, SIZE_LIMIT_BYTES)
    size = wheel.stat().st_size
    if size > limit:
        yield f"{wheel.name} has {size} bytes, over {limit}"
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    if f"{package.import_name}/py.typed" not in names:
        yield f"{wheel.name} has no py.typed"
    if not any(".dist-info/" in name and name.endswith("/LICENSE") for name in names):
        yield f"{wheel.name} has no LICENSE"
    tops = {name.split("/")[0] for name in names}
    for top in sorted(tops - {package.import_name}):
        if not top.endswith(".dist-info"):
            yield f"{wheel.name} installs {top} besides {package.import_name}"
    for name in names:
        if "tests" in name.split("/") or name.split("/")[-1] == "conftest.py":
            yield f"{wheel.name} ships the test file {name}"


def try_out(workspace: Workspace, package: Package, wheels: dict[str, Path], folder: Path, trial: Trial) -> str | None:
    """Install a wheel with core's into an empty environment, import it, and run its README's example.

    Returns:
        What went wrong, or None.
    """
    python = folder / "bin" / "python"
    files = [str(wheels[name]) for name in dict.fromkeys([package.name, CORE])]
    install = [tool("uv"), "pip", "install", "--python", str(python), "--resolution", trial.resolution, *files]
    for argv in ([tool("uv"), "venv", "--quiet", "--python", trial.python or sys.executable, str(folder)], install):
        result = run(argv, folder.parent, env=clean_environment())
        if result.returncode:
            return f"does not install: {result.tail()}"
    imported = run_code(f"import {package.import_name}\n", python)
    if imported.returncode:
        return f"does not import: {imported.tail()}"
    ran = run_blocks(package.folder / "README.md", python, first_only=True)
    if not ran:
        return "its README.md has no python example"
    problem = f"README.md line {ran[0].line} fails: {ran[0].result.tail()}"
    return problem if ran[0].result.returncode else None
