"""The top level keeps its shape, and every package has the same parts."""

from __future__ import annotations

from collections.abc import Iterator

from dynamo_tools.finding import Finding
from dynamo_tools.workspace import Package, Workspace

GATE = "toplevel"
REQUIRED = (
    "AGENTS.md",
    "CLAUDE.md",
    "LICENSE",
    "README.md",
    "docs",
    "integration-tests",
    "packages",
    "pyproject.toml",
    "tools",
    "uv.lock",
)
OPTIONAL = ("CONTRIBUTING.md", "SECURITY.md", "mkdocs.yml", "releases.toml", "towncrier.toml")
PACKAGE_PARTS = ("pyproject.toml", "README.md", "AGENTS.md", "CHANGELOG.md", "LICENSE", "tests")
VAGUE = {"utils", "util", "helpers", "helper", "common", "misc"}


def check(workspace: Workspace) -> Iterator[Finding]:
    """Report names at the top that do not belong, parts that are missing, and modules with vague names."""
    names = {workspace.relative(path).split("/")[0] for path in workspace.files}
    for name in sorted(names - {*REQUIRED, *OPTIONAL}):
        if not name.startswith("."):
            yield Finding(name, 1, GATE, "does not belong at the top level; move it into a member or docs/")
    for name in REQUIRED:
        if name not in names:
            yield Finding(name, 1, GATE, "is missing")
    for package in workspace.packages:
        yield from _package(workspace, package)
    for path in workspace.python_files():
        if path.stem.strip("_") in VAGUE:
            yield Finding(workspace.relative(path), 1, GATE, "has a name that says nothing; name it for its concept")


def _package(workspace: Workspace, package: Package) -> Iterator[Finding]:
    folder = workspace.relative(package.folder)
    if package.folder.name != package.name:
        yield Finding(folder, 1, GATE, f"holds {package.name}; the folder has the distribution's name")
    for part in (*PACKAGE_PARTS, f"src/{package.import_name}/py.typed"):
        if not (package.folder / part).exists():
            yield Finding(f"{folder}/{part}", 1, GATE, "is missing")
    for path in sorted((package.folder / "src").glob("*")):
        if path.is_dir() and path.name not in (package.import_name, "__pycache__"):
            yield Finding(workspace.relative(path), 1, GATE, f"{package.name} owns {package.import_name} alone")
