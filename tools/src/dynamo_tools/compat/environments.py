"""Wheels of releases and of the checkout, and environments that hold a choice of them."""

from __future__ import annotations

import shutil
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path

from dynamo_tools.process import clean_environment, run, tool
from dynamo_tools.releases import Release, extract
from dynamo_tools.wheels import build
from dynamo_tools.workspace import Package, Workspace

Choice = Release | None
"""A release, or None for the checkout."""


def label(choice: Choice) -> str:
    """How a choice is called in reports."""
    return choice.version if choice else "checkout"


@dataclass
class Environments:
    """Builds each wheel once and each environment once, below one folder.

    Attributes:
        workspace: The checkout.
        folder: Where everything is put; the caller removes it.
    """

    workspace: Workspace
    folder: Path
    _wheels: dict[tuple[str, str], Path] = field(default_factory=dict[tuple[str, str], Path])
    _pythons: dict[tuple[Path, ...], Path] = field(default_factory=dict[tuple[Path, ...], Path])
    _lock: threading.RLock = field(default_factory=threading.RLock)

    def source(self, name: str, choice: Choice) -> Package:
        """A package as its release has it, in a folder of its own, or as the checkout has it.

        Raises:
            LookupError: if the commit is not in this clone.
        """
        if choice is None:
            return self.workspace.find(name)
        folder = self.folder / "sources" / choice.tag
        with self._lock:  # the folder is there before all of its files are
            if not folder.is_dir():
                extract(self.workspace, choice.commit, folder)
        return Workspace(folder).find(name)

    def wheel(self, name: str, choice: Choice) -> Path:
        """The wheel of a package.

        Raises:
            LookupError: if it does not build.
        """
        key = (name, label(choice))
        with self._lock:
            if key not in self._wheels:
                package = self.source(name, choice)
                root = Workspace(package.folder.parents[1])
                self._wheels[key] = build(root, [package], self.folder / "wheels" / label(choice))[name]
            return self._wheels[key]

    def python(self, chosen: dict[str, Choice], requirements: list[str] | None = None) -> Path:
        """The interpreter of an environment with these packages and requirements.

        Raises:
            LookupError: if they cannot be installed together.
        """
        wheels = [self.wheel(name, choice) for name, choice in sorted(chosen.items())]
        wanted = [*map(str, wheels), *(requirements or [])]
        with self._lock:
            key = tuple(Path(item) for item in wanted)
            if key not in self._pythons:
                self._pythons[key] = self._install(wanted)
            return self._pythons[key]

    def _install(self, wanted: list[str]) -> Path:
        folder = self.folder / "environments" / str(len(self._pythons))
        python = folder / "bin" / "python"
        install = [tool("uv"), "pip", "install", "--quiet", "--python", str(python), *wanted]
        for argv in ([tool("uv"), "venv", "--quiet", "--python", sys.executable, str(folder)], install):
            result = run(argv, self.folder, env=clean_environment())
            if result.returncode:
                raise LookupError(f"{' '.join(Path(item).name for item in wanted)}: {result.tail()}")
        return python

    def tests(self, name: str, choice: Choice) -> Path:
        """A folder with a package's tests and the root's settings, and without its source."""
        package = self.source(name, choice)
        folder = self.folder / "tests" / f"{name}-{label(choice)}"
        with self._lock:
            if not folder.is_dir():
                relative = Path("packages") / package.folder.name
                ignored = shutil.ignore_patterns("src", "__pycache__", ".venv", "dist")
                shutil.copytree(package.folder, folder / relative, ignore=ignored)
                shutil.copy(package.folder.parents[1] / "pyproject.toml", folder)
        return folder
