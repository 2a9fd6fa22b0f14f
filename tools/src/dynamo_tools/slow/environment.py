"""The environment of a slow job: made once, kept between runs."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from dynamo_tools.process import clean_environment, run, tool
from dynamo_tools.slow.jobs import COMPONENTS, Job
from dynamo_tools.workspace import Workspace

INSTALL_LIMIT_S = 3600.0
TEST_TOOLS = (
    "pytest",
    "pytest-asyncio",
    "pytest-timeout",
    "hypothesis",
    "httpx",
    "openai",
    "aiohttp",
    "pyzmq",
    "zstandard",
)


class Environment:
    """A folder with an interpreter and models.

    Args:
        folder: Below which every job has a folder.
        job: Whose environment.
        find_links: Folder with further wheels, or an empty string.
    """

    def __init__(self, folder: Path, job: Job, find_links: str) -> None:
        self._folder = folder / job.name
        self._job = job
        self._find_links = ["--find-links", find_links] if find_links else []

    @property
    def python(self) -> Path:
        """The interpreter."""
        return self._folder / "venv" / "bin" / "python"

    def install(self, workspace: Workspace) -> None:
        """Make the environment, or bring an older one up to date.

        Raises:
            LookupError: if something cannot be installed.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        if not self.python.exists():
            self._uv("venv", "--python", sys.executable, str(self.python.parents[1]))
        overrides = self._folder / "overrides.txt"
        overrides.write_text("\n".join(self._job.overrides))
        for requirement in self._job.requirements:
            self._pip(*self._find_links, "--override", str(overrides), requirement)
        packages = [workspace.find(name) for name in COMPONENTS]
        editable = [item for package in packages for item in ("--editable", str(package.folder))]
        self._pip(*editable, *TEST_TOOLS)
        for model in self._job.models:
            self._pip("--no-deps", "--target", str(self._folder / "models"), model)

    def versions(self) -> list[str]:
        """What is installed of the distributions that the job names."""
        listed = run([tool("uv"), "pip", "freeze", "--python", str(self.python)], self._folder, env=clean_environment())
        wanted = {_normal(name) for name in self._job.versions}
        return [line for line in listed.stdout.splitlines() if _normal(line.split("==")[0]) in wanted]

    def variables(self, workspace: Workspace) -> dict[str, str]:
        """Variables of the job's tests."""
        variables = dict(self._job.env)
        variables["PYTHONPATH"] = str(workspace.root / "integration-tests" / "src")
        folder = self._folder / "models"
        found = {
            "DYNAMO_SLOW_GGUF": sorted(folder.rglob("*.gguf")),
            "DYNAMO_SLOW_SENTENCES": [
                path.parent for path in sorted(folder.rglob("config_sentence_transformers.json"))
            ],
        }
        return {**variables, **{name: str(paths[0]) for name, paths in found.items() if paths}}

    def _pip(self, *arguments: str) -> None:
        # Without bytecode each of vLLM's processes compiles its sources anew, for a minute and more.
        self._uv("pip", "install", "--quiet", "--compile-bytecode", "--python", str(self.python), *arguments)

    def _uv(self, *arguments: str) -> None:
        result = run([tool("uv"), *arguments], self._folder, timeout_s=INSTALL_LIMIT_S, env=clean_environment())
        if result.returncode:
            raise LookupError(f"uv {' '.join(arguments)}:\n{result.tail()}")


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
