"""Import contracts, by import-linter: those of the root, and the layers that each package declares.

A package declares its layers in its own ``pyproject.toml``, lowest last, and then every module of it must be listed::

    [tool.dynamo]
    layers = ["_component", "_router", "_radix | _active", "_cost"]
    unlayered = ["_settings", "_metrics"]
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dynamo_tools.finding import Finding
from dynamo_tools.process import run, tool
from dynamo_tools.workspace import Package, Workspace

GATE = "contracts"
_BROKEN = re.compile(r"^(?P<name>.+) BROKEN( |$)")
_PLACE = re.compile(r"\(l\.(?P<line>\d+)")
_IMPORTER = re.compile(r"^-?\s*(?P<importer>[\w.]+) -> [\w.]+ \(")
_CIRCLE = re.compile(r"^No cycles are allowed in (?P<parent>[\w.]+)\.$")
_CIRCLE_IMPORT = re.compile(r"^- (?P<importer>\.[\w.]+) -> \.[\w.]+ \(")


def check(workspace: Workspace) -> Iterator[Finding]:
    """Report broken contracts, and packages of several modules that declare no layers."""
    for package in workspace.packages:
        if len(list(package.src.glob("*.py"))) > 2 and "layers" not in package.settings:
            path = workspace.relative(package.folder / "pyproject.toml")
            yield Finding(path, 1, GATE, "declares no [tool.dynamo] layers; list every module in one, highest first")
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "contracts.toml"
        config.write_text(render(contracts(workspace)), encoding="utf-8")
        argv = [tool("lint-imports"), "--config", str(config), "--no-cache", "--no-logo"]
        result = run(argv, workspace.root, env={**os.environ, "PYTHONPATH": _sources(workspace)})
    if result.returncode:
        found = list(read_report(workspace, result.stdout))
        yield from found or [Finding("pyproject.toml", 1, GATE, result.tail(6))]


def _sources(workspace: Workspace) -> str:
    """This checkout's sources, found before whatever is installed."""
    return os.pathsep.join(str(package.src.parent) for package in workspace.packages)


def contracts(workspace: Workspace) -> dict[str, Any]:
    """The root's contracts with one more for each package that declares layers."""
    table = dict(workspace.config.get("tool", {}).get("importlinter", {}))
    declared = [layers(package) for package in workspace.packages if "layers" in package.settings]
    return {**table, "contracts": [*table.get("contracts", []), *declared]}


def layers(package: Package) -> dict[str, Any]:
    """The layers contract of one package."""
    return {
        "id": f"layers-{package.name}",
        "name": f"Layers of {package.name}",
        "type": "layers",
        "containers": [package.import_name],
        "layers": package.settings["layers"],
        "exhaustive": True,
        "exhaustive_ignores": package.settings.get("unlayered", []),
    }


def render(table: dict[str, Any]) -> str:
    """Write the settings as TOML: their values are strings, booleans and lists of strings, which JSON writes alike."""
    lines = ["[tool.importlinter]"]
    lines += [f"{key} = {json.dumps(value)}" for key, value in table.items() if key != "contracts"]
    for contract in table["contracts"]:
        lines += ["", "[[tool.importlinter.contracts]]"]
        lines += [f"{key} = {json.dumps(value)}" for key, value in contract.items()]
    return "\n".join(lines) + "\n"


def read_report(workspace: Workspace, report: str) -> Iterator[Finding]:
    """Turn the report's broken contracts into findings, at the import where it names one."""
    broken = [found["name"] for line in report.splitlines() if (found := _BROKEN.match(line))]
    _, _, details = report.partition("Broken contracts")
    title, parent = "", ""
    for text in (line.strip() for line in details.splitlines()):
        title = text if text in broken else title
        parent = circle["parent"] if (circle := _CIRCLE.match(text)) else parent
        importer, place = _IMPORTER.match(text), _PLACE.search(text)
        if importer and place:
            name = _module_file(workspace, importer["importer"])
            yield Finding(name, int(place["line"]), GATE, f"{title}: {text.lstrip('- ')}")
        elif circular := _CIRCLE_IMPORT.match(text):
            name = _module_file(workspace, parent + circular["importer"])
            yield Finding(name, 1, GATE, f"{title}: {text.lstrip('- ')}")
        elif text.startswith("- "):
            yield Finding("pyproject.toml", 1, GATE, f"{title}: {text.lstrip('- ')}")


def _module_file(workspace: Workspace, module: str) -> str:
    parts = module.split(".")
    for package in workspace.members:
        if package.import_name == parts[0]:
            base = package.src.joinpath(*parts[1:])
            path = base / "__init__.py" if base.is_dir() else base.with_suffix(".py")
            return workspace.relative(path)
    return module
