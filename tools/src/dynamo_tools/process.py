"""Running the tools of the development environment."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

_ISOLATED = ("VIRTUAL_ENV", "PYTHONPATH", "PYTHONHOME", "UV_PROJECT_ENVIRONMENT", "UV_RUN_RECURSION_DEPTH")


@dataclass(frozen=True)
class Result:
    """How a command ended."""

    returncode: int
    stdout: str
    stderr: str

    @property
    def text(self) -> str:
        """Both streams."""
        return self.stdout + self.stderr

    def tail(self, lines: int = 15) -> str:
        """Last lines of the output that are not empty."""
        return "\n".join([line for line in self.text.splitlines() if line.strip()][-lines:])


def tool(name: str) -> str:
    """Path of a command of this environment, or of the machine.

    Raises:
        LookupError: if it is not installed.
    """
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        raise LookupError(f"{name} is not installed; run uv sync")
    return found


def run(argv: list[str], cwd: Path, *, timeout_s: float = 1800, env: Mapping[str, str] | None = None) -> Result:
    """Run a command without a terminal and keep its output; a command that runs too long ends with status 124."""
    try:
        done = subprocess.run(
            argv,
            cwd=cwd,
            env=None if env is None else dict(env),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout_s,
        )
    except subprocess.TimeoutExpired as error:
        return Result(124, _text(error.stdout), f"{argv[0]} did not end within {timeout_s:g} s")
    return Result(done.returncode, done.stdout, done.stderr)


def run_bytes(argv: list[str], cwd: Path) -> bytes | None:
    """Run a command and return its output as it is; None if it fails."""
    done = subprocess.run(argv, cwd=cwd, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    return done.stdout if done.returncode == 0 else None


def show(argv: list[str], cwd: Path, extra: Mapping[str, str] = MappingProxyType({})) -> int:
    """Run a command whose output goes to the terminal; return its status."""
    return subprocess.run(
        argv, cwd=cwd, stdin=subprocess.DEVNULL, check=False, env={**clean_environment(), **extra}
    ).returncode


def clean_environment() -> dict[str, str]:
    """Environment variables without those that point into this environment."""
    return {name: value for name, value in os.environ.items() if name not in _ISOLATED}


def _text(output: bytes | str | None) -> str:
    return output.decode(errors="replace") if isinstance(output, bytes) else output or ""
