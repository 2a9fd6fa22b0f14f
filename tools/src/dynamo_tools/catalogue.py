"""What a package can be configured with and what it measures, read from its sources without importing them.

A setting is a field of a class that derives from ``DynamoSettings``; it is a flag, an environment variable and a key of
the configuration file. A metric is a constant of a ``_metrics`` module; its kind, labels and description are read from
the call that creates it.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from dynamo_tools.source import parse
from dynamo_tools.workspace import Package

_BASE = "DynamoSettings"
_KINDS = ("counter", "gauge", "histogram")
_PREFIX = "dynamo_"
_NO_LIMITS = ("default", "default_factory", "description")


@dataclass(frozen=True, order=True)
class Setting:
    """One option.

    Attributes:
        component: Prefix of the environment variable.
        name: Name of the field.
        kind: Its type, as written.
        default: Its default as written; None if the option is required.
        limits: Constraints as written, for example ``ge=1``.
        text: Its description.
    """

    component: str
    name: str
    kind: str
    default: str | None
    limits: str
    text: str

    @property
    def flag(self) -> str:
        """What is typed on a command line."""
        name = self.name.replace("_", "-")
        return f"--{name}/--no-{name}" if self.kind == "bool" else f"--{name}"

    @property
    def variable(self) -> str:
        """Environment variable."""
        return f"DYN_{self.component}_{self.name}".replace("-", "_").upper()


@dataclass(frozen=True, order=True)
class Metric:
    """One metric: its name, kind, label names, and description. The last three are empty where no call creates it."""

    name: str
    kind: str
    labels: tuple[str, ...]
    text: str


def settings(package: Package) -> list[Setting]:
    """Options of a package, by component and in the order of their fields."""
    classes = [node for path in _sources(package) for node in ast.walk(parse(path)) if isinstance(node, ast.ClassDef)]
    known = {node.name: node for node in classes}
    parents = {name for node in classes for name in _bases(node)}
    found: dict[tuple[str, str], Setting] = {}
    for node in classes:
        component = _component(node, known)
        if _is_settings(node, known) and not (component == node.name and node.name in parents):
            for line in (*_ancestors(node, known), node):
                fields = list(_fields(line, component))
                found |= {(component, field.name): field for field in (*fields, *_former(line, fields))}
    return list(found.values())


def settings_places(package: Package) -> list[tuple[str, str]]:
    """Module and name of each class with options that is defined at the top of a module."""
    trees = {_module(package, path): parse(path) for path in _sources(package)}
    known = {node.name: node for tree in trees.values() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
    return [
        (module.removesuffix(".__init__"), node.name)
        for module, tree in trees.items()
        for node in tree.body
        if isinstance(node, ast.ClassDef) and _is_settings(node, known)
    ]


def metrics(package: Package) -> list[Metric]:
    """Metrics of a package by name."""
    trees = {_module(package, path): parse(path) for path in _sources(package)}
    named = {name: dict(_constants(tree)) for name, tree in trees.items() if name.split(".")[-1].startswith("_metrics")}
    created: dict[str, Metric] = {}
    for module, tree in trees.items():
        scope = {**_imported(tree, named), **named.get(module, {})}
        for metric in [*_created(tree, scope), *_listed(tree, scope)]:
            created.setdefault(metric.name, metric)
    names = {value for constants in named.values() for value in constants.values()}
    return sorted(created.get(name, Metric(name, "", (), "")) for name in names)


def _sources(package: Package) -> list[Path]:
    return sorted(package.src.rglob("*.py"))


def _module(package: Package, path: Path) -> str:
    return ".".join(path.relative_to(package.src.parent).with_suffix("").parts)


def _imported(tree: ast.Module, named: dict[str, dict[str, str]]) -> dict[str, str]:
    """Constants that a module has from a ``_metrics`` module, by the last part of the name it uses."""
    found: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                found |= named.get(f"{node.module}.{alias.name}", {})
                value = named.get(node.module or "", {}).get(alias.name)
                found |= {alias.asname or alias.name: value} if value else {}
    return found


def _listed(tree: ast.Module, constants: dict[str, str]) -> Iterator[Metric]:
    """Metrics of a table or of a call that passes them on: the constant, then its description."""
    for node in ast.walk(tree):
        parts = node.elts if isinstance(node, ast.Tuple) else node.args if isinstance(node, ast.Call) else []
        if len(parts) > 1:
            name, text = constants.get(_last(parts[0]), ""), _text(parts[1])
            if name and text:
                yield Metric(name, "counter" if name.endswith("_total") else "gauge", (), text)


def _is_settings(node: ast.ClassDef, known: dict[str, ast.ClassDef]) -> bool:
    for base in node.bases:
        name = ast.unparse(base).split(".")[-1]
        if name == _BASE or (name in known and name != node.name and _is_settings(known[name], known)):
            return True
    return False


def _bases(node: ast.ClassDef) -> list[str]:
    return [name for base in node.bases if (name := ast.unparse(base).split(".")[-1]) != node.name]


def _ancestors(node: ast.ClassDef, known: dict[str, ast.ClassDef]) -> Iterator[ast.ClassDef]:
    """Classes with options that a class builds on, the first one first."""
    for name in _bases(node):
        if name in known and _is_settings(known[name], known):
            yield from _ancestors(known[name], known)
            yield known[name]


def _component(node: ast.ClassDef, known: dict[str, ast.ClassDef]) -> str:
    """What a class calls its component, or what it inherits; its own name if neither is there."""
    if own := next((text for name, text in _assigned(node) if name == "component" and text), ""):
        return own
    bases = [name for name in _bases(node) if name in known]
    inherited = (_component(known[name], known) for name in bases if _is_settings(known[name], known))
    return next((text for text in inherited if text not in bases), node.name)


def _fields(node: ast.ClassDef, component: str) -> Iterator[Setting]:
    for item in node.body:
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
            name, kind = item.target.id, ast.unparse(item.annotation)
            if name != "component" and not kind.startswith("ClassVar") and not name.startswith("_"):
                yield _field(component, name, item)


def _former(node: ast.ClassDef, fields: list[Setting]) -> Iterator[Setting]:
    """Options under their former names, which ``renamed`` lists."""
    by_name = {field.name: field for field in fields}
    for item in node.body:
        if isinstance(item, ast.AnnAssign) and ast.unparse(item.target) == "renamed" and item.value is not None:
            for old, new in ast.literal_eval(item.value).items():
                present = by_name[new]
                yield replace(present, name=old, text=f"Deprecated: the former name of `{present.flag}`")


def _field(component: str, name: str, item: ast.AnnAssign) -> Setting:
    annotation, value = item.annotation, item.value
    call = value if isinstance(value, ast.Call) and _last(value.func) == "Field" else None
    default = None if call or value is None else ast.unparse(value)
    if isinstance(annotation, ast.Subscript) and _last(annotation.value) == "Annotated":
        parts = annotation.slice.elts if isinstance(annotation.slice, ast.Tuple) else [annotation.slice]
        annotation = parts[0]
        call = next((part for part in parts[1:] if isinstance(part, ast.Call)), call)
    keywords = {word.arg or "": word.value for word in call.keywords} if call else {}
    if call and call.args and default is None and not _is_ellipsis(call.args[0]):
        default = ast.unparse(call.args[0])
    if "default" in keywords:
        default = ast.unparse(keywords["default"])
    elif "default_factory" in keywords:
        default = ast.unparse(keywords["default_factory"]) + "()"
    limits = ", ".join(f"{key}={ast.unparse(word)}" for key, word in keywords.items() if key not in _NO_LIMITS)
    return Setting(component, name, ast.unparse(annotation), default, limits, _text(keywords.get("description")))


def _constants(tree: ast.Module) -> Iterator[tuple[str, str]]:
    return ((name, text) for name, text in _assigned(tree) if text.startswith(_PREFIX))


def _assigned(tree: ast.Module | ast.ClassDef) -> Iterator[tuple[str, str]]:
    """Names that a module or class gives a text."""
    for node in tree.body:
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        if isinstance(target, ast.Name):
            yield target.id, _text(getattr(node, "value", None))


def _created(tree: ast.Module, constants: dict[str, str]) -> Iterator[Metric]:
    names = {
        node.targets[0].id: node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    shared = dict(_wrappers(tree))
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and _last(node.func) in _KINDS and node.args:
            name = constants.get(_last(node.args[0])) or _text(node.args[0])
            if name.startswith(_PREFIX):
                kind = _last(node.func)
                given = _argument(node, 2, "labels")
                labels = _labels(given, names) or (shared.get(kind, ()) if isinstance(node.func, ast.Name) else ())
                yield Metric(name, kind, labels, _text(_argument(node, 1, "documentation")))


def _wrappers(tree: ast.Module) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Functions of a module that bind the same labels to each metric they create."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.name in _KINDS:
            for call in ast.walk(node):
                if isinstance(call, ast.Call) and _last(call.func) in _KINDS:
                    yield node.name, _labels(_argument(call, 2, "labels"), {})


def _labels(node: ast.expr | None, names: dict[str, ast.expr]) -> tuple[str, ...]:
    if isinstance(node, ast.Name):
        return _labels(names.get(node.id), {})
    if isinstance(node, ast.Starred):
        return _labels(node.value, names)
    if isinstance(node, ast.List | ast.Tuple):
        return tuple(label for item in node.elts for label in _labels(item, names))
    return (node.value,) if isinstance(node, ast.Constant) and isinstance(node.value, str) else ()


def _argument(call: ast.Call, position: int, name: str) -> ast.expr | None:
    if len(call.args) > position:
        return call.args[position]
    return next((word.value for word in call.keywords if word.arg == name), None)


def _last(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def _is_ellipsis(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is ...


def _text(node: ast.expr | None) -> str:
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""
