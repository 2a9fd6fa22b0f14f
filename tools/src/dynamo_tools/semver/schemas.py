"""JSON schemas of wire types and settings: written by importing the package in a process of its own, and compared."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from typing import Any

from dynamo_tools import catalogue
from dynamo_tools.process import clean_environment, run
from dynamo_tools.semver.change import Change, Level
from dynamo_tools.workspace import CORE, Package, Workspace

FILE = "api/schemas.json"
_TEXT = ("title", "description", "examples", "$comment")
_PROGRAM = """
import importlib, importlib.util, json, sys
found = {}
core, classes = json.loads(sys.argv[1])
if core and importlib.util.find_spec("dynamo_core.wire"):
    import msgspec
    from dynamo_core.wire import CODECS
    found = {name: msgspec.json.schema(codec.kind) for name, codec in CODECS.items()}
for module, name in classes:
    kind = getattr(importlib.import_module(module), name, None)
    if kind is not None:
        found["settings." + kind.component] = kind.model_json_schema()
print(json.dumps(found))
"""


def dump(workspace: Workspace, package: Package) -> str:
    """Schemas of a package as stable text; empty if it has none.

    Raises:
        LookupError: if the package does not import.
    """
    classes = catalogue.settings_places(package)
    if package.name != CORE and not classes:
        return ""
    sources = os.pathsep.join(str(item.src.parent) for item in workspace.packages)
    request = json.dumps([package.name == CORE, classes])
    argv = [sys.executable, "-c", _PROGRAM, request]
    result = run(argv, workspace.root, env={**clean_environment(), "PYTHONPATH": sources})
    if result.returncode:
        raise LookupError(f"{package.name} does not import: {result.tail(3)}")
    found = json.loads(result.stdout)
    return json.dumps(_plain(found), indent=1, sort_keys=True) + "\n" if found else ""


def compare(old_text: str, new_text: str) -> list[Change]:
    """Every difference of two dumps."""
    old, new = json.loads(old_text or "{}"), json.loads(new_text or "{}")
    found = [Change(f"schema {name}", "is removed", Level.MAJOR) for name in old.keys() - new.keys()]
    found += [Change(f"schema {name}", "is added", Level.MINOR) for name in new.keys() - old.keys()]
    for name in old.keys() & new.keys():
        found += _node(f"schema {name}", old[name], new[name])
    return sorted(set(found))


def _node(path: str, old: Any, new: Any) -> Iterator[Change]:
    if not isinstance(old, dict) or not isinstance(new, dict):
        if old != new:
            yield Change(path, f"changes from {json.dumps(old)} to {json.dumps(new)}", Level.MAJOR)
        return
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key), new.get(key)
        if before != after:
            yield from _key(path, key, before, after)


def _key(path: str, key: str, old: Any, new: Any) -> Iterator[Change]:
    if key in ("properties", "$defs"):
        yield from _children(path, key, old or {}, new or {})
    elif key == "required":
        for name in set(new or []) - set(old or []):
            yield Change(f"{path}.{name}", "is required", Level.MAJOR)
        for name in set(old or []) - set(new or []):
            yield Change(f"{path}.{name}", "is no longer required", Level.MINOR)
    elif key in ("enum", "anyOf") and old and new:
        before, after = ({json.dumps(item, sort_keys=True) for item in items} for items in (old, new))
        level = Level.MINOR if before < after else Level.MAJOR
        yield Change(path, f"has other values: {_list(before ^ after)}", level)
    elif key == "prefixItems" and old and new:
        grown = new[: len(old)] == old
        yield Change(path, "grows at its end" if grown else "has other items", Level.MINOR if grown else Level.MAJOR)
    elif key == "default":
        yield Change(path, f"has the default {json.dumps(new)} in place of {json.dumps(old)}", Level.MINOR)
    elif isinstance(old, dict) and isinstance(new, dict):
        yield from _node(f"{path}.{key}", old, new)
    else:
        yield Change(path, f"has {key} {json.dumps(new)} in place of {json.dumps(old)}", Level.MAJOR)


def _children(path: str, key: str, old: dict[str, Any], new: dict[str, Any]) -> Iterator[Change]:
    gone = Level.MAJOR if key == "properties" else Level.PATCH  # a definition counts where something refers to it
    for name in old.keys() - new.keys():
        yield Change(f"{path}.{name}", "is removed", gone)
    for name in new.keys() - old.keys():
        yield Change(f"{path}.{name}", "is added", Level.MINOR if key == "properties" else Level.PATCH)
    for name in old.keys() & new.keys():
        yield from _node(f"{path}.{name}", old[name], new[name])


def _list(items: set[str]) -> str:
    return ", ".join(sorted(items))


def _plain(node: Any) -> Any:
    """A schema without its words, which are not part of the promise."""
    if isinstance(node, dict):
        return {
            key: {name: _plain(item) for name, item in value.items()}
            if key in ("properties", "$defs")
            else _plain(value)
            for key, value in node.items()
            if key not in _TEXT or not isinstance(value, str | list)
        }
    return [_plain(item) for item in node] if isinstance(node, list) else node
