"""What the documentation takes from the sources when it is built: options, metrics, plug-ins, errors, dependencies.

A page asks for it with a line ``<!-- from the sources: WHAT PACKAGE -->``. MkDocs loads this file as a hook, in an
environment that has only MkDocs, so it imports nothing beyond the standard library and this folder.
"""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dynamo_tools import catalogue
from dynamo_tools.source import parse
from dynamo_tools.workspace import CORE, Package, Workspace

_ASKED = re.compile(r"^<!-- from the sources: (?P<what>[a-z-]+)(?: (?P<package>[a-z-]+))? -->$", re.MULTILINE)
_RELATIVE_LINK = re.compile(r"\[([^\]]+)\]\((?!https?://|#)[^)]*\)")
_HEADING = re.compile(r"^(#+) ", re.MULTILINE)
_ROOT = Path(__file__).resolve().parents[3]


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Hook of MkDocs: fill a page in."""
    return expand(markdown, Workspace(_ROOT))


def expand(markdown: str, workspace: Workspace) -> str:
    """Replace each request of a page.

    Raises:
        LookupError: if it asks for something that there is not.
    """

    def fill(found: re.Match[str]) -> str:
        make = _MAKERS.get(found["what"])
        if make is None:
            raise LookupError(f"a page asks for {found['what']!r}; there are {', '.join(sorted(_MAKERS))}")
        return make(workspace, workspace.find(found["package"]) if found["package"] else workspace.packages[0])

    return _ASKED.sub(fill, markdown)


def transitive(workspace: Workspace) -> dict[str, set[str]]:
    """For each published package, every distribution that installing it brings, without itself; from the lock."""
    lock = tomllib.loads((workspace.root / "uv.lock").read_text(encoding="utf-8"))
    needs = {
        str(entry["name"]): {str(item["name"]) for item in entry.get("dependencies", [])} for entry in lock["package"]
    }
    return {package.name: _closure(package.name, needs) - {package.name} for package in workspace.packages}


def _closure(name: str, needs: dict[str, set[str]]) -> set[str]:
    found, queue = {name}, [name]
    while queue:
        for item in needs.get(queue.pop(), set()) - found:
            found.add(item)
            queue.append(item)
    return found


def _readme(_: Workspace, package: Package) -> str:
    """The README below its title, one level deeper; links into the repository become plain words."""
    text = (package.folder / "README.md").read_text(encoding="utf-8").partition("\n")[2]
    parts = re.split(r"(^```.*?^```$)", text, flags=re.MULTILINE | re.DOTALL)
    return "".join(
        part if part.startswith("```") else _RELATIVE_LINK.sub(r"\1", _HEADING.sub(r"#\1 ", part)) for part in parts
    )


def _settings(_: Workspace, package: Package) -> str:
    found = catalogue.settings(package)
    if not found:
        return "This package has no options of its own."
    parts: list[str] = []
    for component in dict.fromkeys(item.component for item in found):
        rows = [
            (f"`{item.flag}`<br>`{item.variable}`", _default(item), f"{_words(item.text)}<br>{_kind(item)}")
            for item in found
            if item.component == component
        ]
        parts.append(f"### Options of `{component}`\n\n")
        parts.append(_table(("flag and variable", "default", "meaning and type"), rows) + "\n")
    return "".join(parts)


def _kind(item: catalogue.Setting) -> str:
    return f"{_code(item.kind)}{', ' + _code(item.limits) if item.limits else ''}"


def _default(item: catalogue.Setting) -> str:
    return "required" if item.default is None else _code(item.default)


def _metrics(_: Workspace, package: Package) -> str:
    rows = [
        (f"`{item.name}`", item.kind, ", ".join(f"`{label}`" for label in item.labels), _words(item.text))
        for item in catalogue.metrics(package)
    ]
    return _table(("metric", "kind", "labels", "meaning"), rows) if rows else "This package has no metrics of its own."


def _plugins(_: Workspace, package: Package) -> str:
    groups: dict[str, dict[str, str]] = package.config["project"].get("entry-points", {})
    rows = [(f"`{group}`", f"`{name}`") for group, entries in groups.items() for name in entries]
    rows += [("command", f"`{name}`") for name in package.config["project"].get("scripts", {})]
    return _table(("group", "name"), rows) if rows else "This package registers nothing."


def _kinds(workspace: Workspace, _: Package) -> str:
    core = workspace.find(CORE)
    kinds = _assigned(parse(core.src / "plugins.py"), "KINDS")
    owners: dict[str, list[str]] = {}
    for package in workspace.packages:
        for group, entries in package.config["project"].get("entry-points", {}).items():
            owners.setdefault(group, []).extend(f"`{name}`" for name in entries)
    rows = [
        (f"`dynamo_core.{kind}`", _words(text), ", ".join(owners.get(f"dynamo_core.{kind}", [])))
        for kind, text in kinds.items()
    ]
    return _table(("entry-point group", "an entry is", "built in"), rows)


def _design(_: Workspace, package: Package) -> str:
    """Modules by layer, top first, each with the first line of its docstring."""
    layers = package.config["tool"]["dynamo"]["layers"]
    rows = [
        (str(number), f"`{name}`", _words(_first_line(package.src, name)))
        for number, layer in zip(range(len(layers), 0, -1), layers, strict=True)
        for name in layer.split(" | ")
    ]
    return _table(("layer", "module", "holds"), rows)


def _first_line(source: Path, module: str) -> str:
    path = source / f"{module}.py"
    docstring = ast.get_docstring(parse(path if path.is_file() else source / module / "__init__.py"))
    return (docstring or "").partition("\n\n")[0].replace("``", "`")


def _errors(workspace: Workspace, package: Package) -> str:
    known = _error_classes(workspace.find(CORE))
    raised = {
        name.split(".")[-1]
        for path in sorted(package.src.rglob("*.py"))
        for node in ast.walk(parse(path))
        if isinstance(node, ast.Call) and (name := ast.unparse(node.func)).split(".")[-1] in known
    }
    rows = [
        (f"`{name}`", str(values.get("http_status", "")), f"`{values.get('default_reason', '')}`", str(values["words"]))
        for name, values in known.items()
        if package.name == CORE or name in raised
    ]
    return _table(("error", "HTTP status", "reason unless it is closer", "means"), rows)


def _error_classes(core: Package) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for node in parse(core.src / "errors.py").body:
        if isinstance(node, ast.ClassDef) and node.name.endswith("Error") and node.name != "DynamoError":
            values = {
                target.id: item.value.value
                for item in node.body
                if isinstance(item, ast.Assign) and isinstance(item.value, ast.Constant)
                for target in item.targets
                if isinstance(target, ast.Name)
            }
            found[node.name] = {**values, "words": (ast.get_docstring(node) or "").split("\n")[0]}
    return found


def _assigned(tree: ast.Module, name: str) -> dict[str, str]:
    for node in tree.body:
        target = getattr(node, "target", None)
        if isinstance(node, ast.AnnAssign) and isinstance(target, ast.Name) and target.id == name and node.value:
            return dict(ast.literal_eval(node.value))
    return {}


def _changelog(_: Workspace, package: Package) -> str:
    text = (package.folder / "CHANGELOG.md").read_text(encoding="utf-8").partition("<!-- towncrier")[2]
    text = text.partition("-->")[2].strip()
    return _HEADING.sub(r"#\1 ", text) if text else "Nothing is released yet."


def _requirements(_: Workspace, package: Package) -> str:
    project = package.config["project"]
    needed = ", ".join(f"`{item}`" for item in project.get("dependencies", []))
    lines = [f"Version {project['version']}; Python {project['requires-python']}; needs {needed}."]
    for extra, items in project.get("optional-dependencies", {}).items():
        lines.append(f"Extra `{extra}` adds {', '.join(f'`{item}`' for item in items)}.")
    return "\n\n".join(lines)


def _dependencies(workspace: Workspace, _: Package) -> str:
    rows = [(name, str(len(found)), ", ".join(sorted(found))) for name, found in transitive(workspace).items()]
    return _table(("package", "distributions it brings", "which"), rows)


def _versions(workspace: Workspace, _: Package) -> str:
    return _table(("package", "version"), [(package.name, package.version) for package in workspace.packages])


def _code(text: str) -> str:
    """Code in a cell of a table, where a bar would end the cell."""
    if "|" in text:
        return f"<code>{_words(text)}</code>"
    return f"`{text}`" if text else ""


def _words(text: str) -> str:
    return text.replace("|", "&#124;").replace("<", "&lt;").replace("\n", " ")


def _table(heads: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    heads = list(heads)
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)]) + "\n"


_MAKERS: dict[str, Callable[[Workspace, Package], str]] = {
    "changelog": _changelog,
    "dependencies": _dependencies,
    "design": _design,
    "errors": _errors,
    "kinds": _kinds,
    "metrics": _metrics,
    "plugins": _plugins,
    "readme": _readme,
    "requirements": _requirements,
    "settings": _settings,
    "versions": _versions,
}
