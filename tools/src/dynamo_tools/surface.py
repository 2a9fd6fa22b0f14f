"""The public surface of a package as sorted lines of text, which a reviewer reads as a diff.

Static: nothing is imported. Core's plain modules are public, with everything in them; of a component, what its
``__init__`` lists in ``__all__``, lazy names included. Settings (flag, variable, type, default, limits,
description), metrics (kind, labels, description) and entry points are public wherever they are written.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import griffe
from packaging.requirements import Requirement

from dynamo_tools import catalogue
from dynamo_tools.source import parse
from dynamo_tools.workspace import CORE, Package

HEADER = "# Public surface; written by `uv run dyn surface --write`, reviewed as a diff.\n"
_FLAG_DECORATORS = ("dataclass", "runtime_checkable", "final", "beta", "experimental", "deprecated", "overload")


def dump(package: Package) -> str:
    """Return the surface of a package."""
    module = griffe.load(package.import_name, search_paths=[package.src.parent], allow_inspection=False)
    assert isinstance(module, griffe.Module)
    lines = {*_public(package, module), *_settings(package), *_metrics(package), *_entry_points(package)}
    return HEADER + "".join(f"{line}\n" for line in sorted(lines))


def _public(package: Package, module: griffe.Module) -> Iterator[str]:
    names = [str(name).strip("'\"") for name in module.exports or []]
    for name in names:
        path, member = f"{package.import_name}.{name}", module.members.get(name) or _lazy(module, name)
        if package.name == CORE and isinstance(member, griffe.Alias):
            yield f"{path} = {member.target_path}"  # spelled out below, where it is defined
        else:
            yield from _member(path, member)
    if package.name == CORE:
        for child in _modules(module):
            for name, member in child.members.items():
                if not name.startswith("_") and not member.is_alias and not member.is_module:
                    yield from _member(f"{child.path}.{name}", member)


def _lazy(module: griffe.Module, name: str) -> griffe.Alias | None:
    """What a module's ``__getattr__`` imports under a name."""
    assert isinstance(module.filepath, Path)
    for node in ast.walk(parse(module.filepath)):
        if isinstance(node, ast.FunctionDef) and node.name == "__getattr__":
            for inner in ast.walk(node):
                if isinstance(inner, ast.ImportFrom):
                    for alias in inner.names:
                        if (alias.asname or alias.name) == name:
                            return griffe.Alias(name, f"{inner.module}.{alias.name}", parent=module)
    return None


def _modules(module: griffe.Module) -> Iterator[griffe.Module]:
    for child in module.modules.values():
        if not child.is_alias and not child.name.startswith("_"):
            yield child
            yield from _modules(child)


def _member(path: str, member: griffe.Object | griffe.Alias | None) -> Iterator[str]:
    if member is None:
        yield f"{path}: lazy"
        return
    if isinstance(member, griffe.Alias):
        try:
            member = member.final_target
        except griffe.AliasResolutionError:
            yield f"{path} = {member.target_path}"
            return
    if isinstance(member, griffe.Class):
        yield from _class(path, member)
    elif isinstance(member, griffe.Function):
        yield _function(path, member)
    elif isinstance(member, griffe.Attribute):
        yield _attribute(path, member)


def _class(path: str, member: griffe.Class) -> Iterator[str]:
    bases = [str(base) for base in member.bases]
    keywords = [f"{key}={value}" for key, value in getattr(member, "keywords", {}).items()]
    flags = "".join(f"@{flag} " for flag in _flags(member.decorators))
    yield f"{path} {flags}class({', '.join([*bases, *keywords])})"
    if "array_like=True" in keywords:
        order = ", ".join(name for name, field in member.attributes.items() if field.annotation is not None)
        yield f"{path} order: {order}"  # such a type travels as an array: the order is part of the wire format
    options = any(str(base).split(".")[-1] == "DynamoSettings" for base in member.bases)
    for name, child in member.members.items():
        if options and isinstance(child, griffe.Attribute) and "property" not in child.labels:
            continue  # listed as settings
        if not name.startswith("_") or name in ("__init__", "__call__"):
            yield from _member(f"{path}.{name}", child)


def _function(path: str, member: griffe.Function) -> str:
    flags = "".join(f"@{flag} " for flag in _flags(member.decorators))
    kind = "async def" if "async" in member.labels else "def"
    kind += "".join(f" {label}" for label in ("staticmethod", "classmethod", "property") if label in member.labels)
    returns = f" -> {member.returns}" if member.returns is not None else ""
    return f"{path} {flags}{kind}{_parameters(member.parameters)}{returns}"


def _parameters(parameters: griffe.Parameters) -> str:
    shown: list[str] = []
    kinds = griffe.ParameterKind
    keyword_only = False
    listed = list(parameters)
    for index, parameter in enumerate(listed):
        if parameter.kind is kinds.var_positional:
            keyword_only = True
        elif parameter.kind is kinds.keyword_only and not keyword_only:
            keyword_only = True
            shown.append("*")
        shown.append(_parameter(parameter))
        following = listed[index + 1] if index + 1 < len(listed) else None
        if parameter.kind is kinds.positional_only and (following is None or following.kind is not parameter.kind):
            shown.append("/")
    return f"({', '.join(shown)})"


def _parameter(parameter: griffe.Parameter) -> str:
    stars = {griffe.ParameterKind.var_positional: "*", griffe.ParameterKind.var_keyword: "**"}
    prefix = stars.get(parameter.kind, "") if parameter.kind else ""
    annotation = f": {parameter.annotation}" if parameter.annotation is not None else ""
    default = f" = {parameter.default}" if parameter.default is not None and not prefix else ""
    return f"{prefix}{parameter.name}{annotation}{default}"


def _attribute(path: str, member: griffe.Attribute) -> str:
    annotation = f": {_one_line(member.annotation)}" if member.annotation is not None else ""
    kind = " property" if "property" in member.labels else ""
    hidden = member.value is None or ("instance-attribute" in member.labels and "class-attribute" not in member.labels)
    value = "" if hidden else f" = {_value(member.value)}"
    return f"{path}{kind}{annotation}{value}"


def _value(value: Any) -> str:
    """A default, without the description of a settings field: wording is not public."""
    if isinstance(value, griffe.ExprCall):
        kept = [item for item in value.arguments if getattr(item, "name", "") != "description"]
        return f"{value.function}({', '.join(_one_line(item) for item in kept)})"
    return _one_line(value)


def _flags(decorators: list[griffe.Decorator]) -> Iterator[str]:
    for decorator in decorators:
        name = str(decorator.value).split("(")[0].split(".")[-1]
        if name in _FLAG_DECORATORS:
            yield _one_line(decorator.value)


def _settings(package: Package) -> Iterator[str]:
    """Options: each is a flag, an environment variable and a key of the configuration file, wherever its class is."""
    for item in catalogue.settings(package):
        value = "required" if item.default is None else f"= {item.default}"
        limits = f" ({item.limits})" if item.limits else ""
        yield f"settings {item.component}.{item.name} {item.flag} {item.variable}: {item.kind} {value}{limits}"
        yield f"settings-text {item.component}.{item.name} {item.text}"


def _metrics(package: Package) -> Iterator[str]:
    for item in catalogue.metrics(package):
        yield f"metric {item.name} {item.kind or 'unknown'}({', '.join(item.labels)})"
        yield f"metric-text {item.name} {item.text}"


def _entry_points(package: Package) -> Iterator[str]:
    project = package.config["project"]
    groups: dict[str, dict[str, str]] = dict(project.get("entry-points", {}))
    groups["console_scripts"] = project.get("scripts", {})
    yield f"requires python: {project['requires-python']}"
    for requirement in project.get("dependencies", []):
        if Requirement(requirement).name == CORE:
            yield f"requires {CORE}: {Requirement(requirement).specifier}"
    for group, entries in groups.items():
        yield from (f"entry-point {group}: {name} = {target}" for name, target in entries.items())
    for extra, requirements in project.get("optional-dependencies", {}).items():
        yield f"extra {extra}: {', '.join(requirements)}"


def _one_line(value: Any) -> str:
    return " ".join(str(value).split())
