"""From changed files to the members whose tests must run, by the graph of the lock."""

from __future__ import annotations

from collections.abc import Iterable

from dynamo_tools.workspace import Workspace, read_toml

_NO_TESTS = ("docs/", ".github/", "changes/")
_NO_TEST_SUFFIXES = (".md",)


def affected_members(workspace: Workspace, changed: Iterable[str]) -> set[str]:
    """Members that own a changed file, and members that depend on those; every member for a file of the root."""
    names = {package.name for package in workspace.members}
    owners = {workspace.relative(package.folder) + "/": package.name for package in workspace.members}
    touched: set[str] = set()
    for path in changed:
        owner = next((name for folder, name in owners.items() if path.startswith(folder)), None)
        if owner is not None:
            touched.add(owner)
        elif path.startswith(("packages/",)):
            raise LookupError(f"{path} belongs to no member; give its folder a pyproject.toml")
        elif not path.startswith(_NO_TESTS) and not path.endswith(_NO_TEST_SUFFIXES):
            return names
    return _with_dependents(touched, dependents(workspace))


def dependents(workspace: Workspace) -> dict[str, set[str]]:
    """For each member, the members that require it, as the lock has it."""
    names = {package.name for package in workspace.members}
    found: dict[str, set[str]] = {name: set() for name in names}
    for entry in read_toml(workspace.root / "uv.lock").get("package", []):
        if entry["name"] in names:
            for requirement in entry.get("dependencies", []):
                if requirement["name"] in names:
                    found[requirement["name"]].add(entry["name"])
    return found


def _with_dependents(touched: set[str], graph: dict[str, set[str]]) -> set[str]:
    found, queue = set(touched), list(touched)
    while queue:
        for name in graph.get(queue.pop(), set()) - found:
            found.add(name)
            queue.append(name)
    return found
