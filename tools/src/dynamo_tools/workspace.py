"""The workspace as gates see it: its packages, their files and their metadata."""

from __future__ import annotations

import subprocess
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

CORE = "dynamo-core"
_SKIPPED = {"__pycache__", "dist", "build", "site", "node_modules"}


@dataclass(frozen=True)
class Package:
    """One member of the workspace.

    Attributes:
        folder: Its folder.
        config: Its whole ``pyproject.toml``.
    """

    folder: Path
    config: dict[str, Any]

    @property
    def name(self) -> str:
        """Name of the distribution."""
        return str(self.config["project"]["name"])

    @property
    def import_name(self) -> str:
        """Name of the import package."""
        return self.name.replace("-", "_")

    @property
    def version(self) -> str:
        """Static version."""
        return str(self.config["project"]["version"])

    @property
    def src(self) -> Path:
        """Folder that holds ``__init__.py``."""
        return self.folder / "src" / self.import_name

    @property
    def tests(self) -> Path:
        """Folder of its tests."""
        return self.folder / "tests"

    @property
    def settings(self) -> dict[str, Any]:
        """Table ``[tool.dynamo]``: what the package declares to the gates."""
        return dict(self.config.get("tool", {}).get("dynamo", {}))


class Workspace:
    """A checkout.

    Args:
        root: Folder with the workspace's ``pyproject.toml``.
    """

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()

    @cached_property
    def config(self) -> dict[str, Any]:
        """The root's ``pyproject.toml``."""
        return read_toml(self.root / "pyproject.toml")

    @cached_property
    def packages(self) -> list[Package]:
        """Published packages: every folder of ``packages`` with a ``pyproject.toml``, core first."""
        found = [_package(path.parent) for path in self.root.glob("packages/*/pyproject.toml")]
        return sorted(found, key=lambda package: (package.name != CORE, package.name))

    @cached_property
    def members(self) -> list[Package]:
        """Published packages, tools and integration tests."""
        private = [self.root / name for name in ("tools", "integration-tests")]
        return self.packages + [_package(path) for path in private if (path / "pyproject.toml").is_file()]

    @property
    def components(self) -> list[Package]:
        """Published packages without core."""
        return [package for package in self.packages if package.name != CORE]

    @property
    def core(self) -> Package | None:
        """The package that all others may import."""
        return next((package for package in self.packages if package.name == CORE), None)

    @cached_property
    def files(self) -> list[Path]:
        """Every file that git tracks or would add; without git, every file that is no build product."""
        listed = self.git("ls-files", "-co", "--exclude-standard", "--deduplicate")
        if listed is None:
            return sorted(_walk(self.root))
        return [path for path in (self.root / line for line in sorted(listed.splitlines())) if path.is_file()]

    def python_files(self, *folders: Path) -> list[Path]:
        """Python files below the folders, or of the whole workspace."""
        sources = [path for path in self.files if path.suffix == ".py"]
        if not folders:
            return sources
        return [path for path in sources if any(path.is_relative_to(folder) for folder in folders)]

    def relative(self, path: Path) -> str:
        """Path below the root, with slashes."""
        return path.relative_to(self.root).as_posix()

    def find(self, name: str) -> Package:
        """Return a member by distribution name or its short form.

        Raises:
            LookupError: if there is none; the message lists the names.
        """
        for package in self.members:
            if name in (package.name, package.name.removeprefix("dynamo-")):
                return package
        raise LookupError(f"no package {name!r}; there are {', '.join(p.name for p in self.members)}")

    def git(self, *arguments: str) -> str | None:
        """Output of a git command, or None if it fails or the root is no checkout of its own."""
        if not (self.root / ".git").exists():
            return None
        result = subprocess.run(["git", *arguments], cwd=self.root, capture_output=True, text=True, check=False)
        return result.stdout if result.returncode == 0 else None


def find_root(start: Path) -> Path:
    """Walk up to the folder whose ``pyproject.toml`` declares the workspace.

    Raises:
        LookupError: if there is none.
    """
    for folder in (start, *start.parents):
        path = folder / "pyproject.toml"
        if path.is_file() and "workspace" in read_toml(path).get("tool", {}).get("uv", {}):
            return folder
    raise LookupError(f"{start} is not inside the workspace; run dyn from a checkout")


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file."""
    return tomllib.loads(path.read_text(encoding="utf-8"))


def _package(folder: Path) -> Package:
    return Package(folder, read_toml(folder / "pyproject.toml"))


def _walk(folder: Path) -> Iterator[Path]:
    for path in folder.iterdir():
        if path.is_file():
            yield path
        elif path.name not in _SKIPPED and path.name not in (".venv", ".git"):
            yield from _walk(path)
