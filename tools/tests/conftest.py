"""A tiny workspace that passes every gate; each test breaks one thing in it."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from dynamo_tools.finding import Finding
from dynamo_tools.releases import Release, record
from dynamo_tools.semver import schemas
from dynamo_tools.surface import dump
from dynamo_tools.workspace import Workspace

ROOT = """
[project]
name = "tiny-workspace"
version = "0"
requires-python = ">=3.11"

[tool.uv]
package = false

[tool.uv.workspace]
members = ["packages/*"]

[tool.uv.sources]
dynamo-core = { workspace = true }

[tool.ruff.lint]
select = ["F"]

[tool.pyright]
typeCheckingMode = "strict"
include = ["packages/**/src"]

[tool.importlinter]
root_packages = ["dynamo_core", "dynamo_router", "dynamo_worker"]
include_external_packages = true

[[tool.importlinter.contracts]]
id = "independence"
name = "Components know core, never each other"
type = "independence"
modules = ["dynamo_router", "dynamo_worker"]
"""

MEMBER = """
[project]
name = "{name}"
version = "{version}"
requires-python = ">=3.11"
dependencies = [{dependencies}]

[dependency-groups]
test = ["pytest>=8"]

[build-system]
requires = ["hatchling>=1.26"]
build-backend = "hatchling.build"
"""

TOWNCRIER = """
[tool.towncrier]
name = ""
package = ""
directory = "changes"
filename = "CHANGELOG.md"
title_format = "## {version} ({project_date})"
issue_format = "#{issue}"
start_string = "<!-- towncrier release notes start -->\\n"
underlines = ["", "", ""]
"""
KINDS = ("breaking", "deprecated", "added", "changed", "fixed")


class Tree:
    """A workspace in a temporary folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for name in ("AGENTS.md", "CLAUDE.md", "LICENSE", "README.md", "uv.lock", "docs/index.md"):
            self.write(name, "Text.\n")
        for name in ("tools/.keep", "integration-tests/.keep"):
            self.write(name, "")
        self.write("pyproject.toml", ROOT)
        self.package("dynamo-core", "1.2.0", "")
        self.package("dynamo-router", "0.1.0", '"dynamo-core>=1.0,<2"')
        self.package("dynamo-worker", "0.1.0", '"dynamo-core>=1.0,<2"')

    def package(self, name: str, version: str, dependencies: str) -> None:
        folder, module = f"packages/{name}", name.replace("-", "_")
        self.write(f"{folder}/pyproject.toml", MEMBER.format(name=name, version=version, dependencies=dependencies))
        for part in ("README.md", "AGENTS.md", "CHANGELOG.md", "LICENSE", "changes/+start.added.md"):
            self.write(f"{folder}/{part}", "Text.\n")
        imported = "" if name == "dynamo-core" else "import dynamo_core\n\n"
        code = f'"""Package."""\n\n{imported}__all__ = ["answer"]\n\n\ndef answer() -> int:\n    """Answer."""\n'
        body = "    return 42\n" if name == "dynamo-core" else "    return dynamo_core.answer()\n"
        self.write(f"{folder}/src/{module}/__init__.py", code + body)
        self.write(f"{folder}/src/{module}/py.typed", "")
        self.write(f"{folder}/tests/api/test_exports.py", '"""Exports."""\n')

    def write(self, name: str, text: str) -> None:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")

    def append(self, name: str, text: str) -> None:
        self.write(name, self.read(name) + text)

    def replace(self, name: str, old: str, new: str) -> None:
        text = self.read(name)
        assert old in text
        self.write(name, text.replace(old, new))

    def read(self, name: str) -> str:
        return (self.root / name).read_text(encoding="utf-8")

    def remove(self, name: str) -> None:
        (self.root / name).unlink()

    def git(self, *arguments: str) -> None:
        identity = ("-c", "user.name=Tester", "-c", "user.email=tester@example.com")
        subprocess.run(["git", *identity, *arguments], cwd=self.root, check=True, capture_output=True)

    def commit(self, message: str) -> None:
        self.git("add", "-A")
        self.git("commit", "-q", "-m", message)

    def release(self, name: str, version: str = "") -> None:
        """Set the version, write the surface, commit, tag and record the package."""
        if version:
            path = f"packages/{name}/pyproject.toml"
            self.replace(path, f'version = "{self.workspace().find(name).version}"', f'version = "{version}"')
        workspace = self.workspace()
        package = workspace.find(name)
        self.write(f"packages/{name}/api/public.txt", dump(package))
        if text := schemas.dump(workspace, package):
            self.write(f"packages/{name}/api/schemas.json", text)
        self.git("add", "-A")
        self.git("commit", "-q", "--allow-empty", "-m", f"Release {name} {package.version}")
        release = Release(name, package.version, (workspace.git("rev-parse", "HEAD") or "").strip())
        self.git("tag", release.tag)
        record(workspace, release)
        self.commit(f"Record {release.tag}")

    def workspace(self) -> Workspace:
        return Workspace(self.root)

    def failures(self, check: Callable[[Workspace], Iterable[Finding]]) -> list[str]:
        """Findings of a gate on the tree as it is, notes left out."""
        return [str(finding) for finding in check(self.workspace()) if finding.fails]


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path)


@pytest.fixture
def released(tree: Tree) -> Tree:
    """Each package released once, on the main branch, with its fragments gone and its surface committed."""
    tree.git("init", "-q", "-b", "main")
    for package in tree.workspace().packages:
        tree.remove(f"packages/{package.name}/changes/+start.added.md")
        tree.write(f"packages/{package.name}/changes/.gitignore", "")
    tree.commit("Release everything")
    for package in tree.workspace().packages:
        tree.release(package.name)
    return tree


@pytest.fixture
def clone(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> Tree:
    """A workspace that is never released, which uv can lock and build without any package from outside."""
    types = "".join(
        f'[[tool.towncrier.type]]\ndirectory = "{k}"\nname = "{k.title()}"\nshowcontent = true\n' for k in KINDS
    )
    tree.write("towncrier.toml", TOWNCRIER + types)
    tree.remove("uv.lock")
    members = (
        '\n[tool.uv.workspace]\nmembers = ["packages/*"]\n\n[tool.uv.sources]\ndynamo-core = { workspace = true }\n'
    )
    root = '[project]\nname = "root"\nversion = "0"\nrequires-python = ">=3.11"\n\n[tool.uv]\npackage = false\n'
    tree.write("pyproject.toml", root + members)
    for package in tree.workspace().packages:
        path = f"packages/{package.name}"
        tree.replace(f"{path}/pyproject.toml", '[dependency-groups]\ntest = ["pytest>=8"]\n', "")
        license_files = 'license = "Apache-2.0"\nlicense-files = ["LICENSE"]\nrequires-python'
        tree.replace(f"{path}/pyproject.toml", "requires-python", license_files)
        tree.write(f"{path}/CHANGELOG.md", "# Changelog\n\n<!-- towncrier release notes start -->\n")
    tree.git("init", "-q", "-b", "main")
    for key, value in (("user.name", "Tester"), ("user.email", "tester@example.com")):
        tree.git("config", key, value)
    tree.commit("Start")
    monkeypatch.chdir(tree.root)
    return tree
