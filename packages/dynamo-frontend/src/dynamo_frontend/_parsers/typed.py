"""Arguments that are written as text by name: their types come from the tool's schema, their JSON is written here."""

from __future__ import annotations

import ast
import json
from collections.abc import Collection, Mapping
from typing import Any, cast

from dynamo_core.parsing import ParserContext
from dynamo_frontend._parsers.machine import Cursor, Markers, Output, Steps, is_json

STRING = frozenset({"string"})
UNKNOWN: frozenset[str] = frozenset()
_ALIASES = {
    "arr": "array",
    "bool": "boolean",
    "dict": "object",
    "float": "number",
    "int": "integer",
    "list": "array",
    "str": "string",
    "text": "string",
}
_TYPES = frozenset({"array", "boolean", "integer", "null", "number", "object", "string"})
_BRANCHES = ("anyOf", "oneOf", "allOf")
_MAX_DEPTH = 8


def tool_schema(context: ParserContext, name: str) -> Mapping[str, Any]:
    """Return the schema of a function's parameters; empty if the request has no such tool."""
    return context.tools.get(name, {})


def property_schema(schema: Mapping[str, Any], key: str) -> Mapping[str, Any] | None:
    """Return the schema of a property, or None if it is not described."""
    for part in _alternatives(schema):
        properties = part.get("properties")
        if isinstance(properties, dict) and isinstance(properties.get(key), dict):
            return cast("dict[str, Any]", properties[key])
    extra = schema.get("additionalProperties")
    return cast("dict[str, Any]", extra) if isinstance(extra, dict) else None


def item_schema(schema: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the schema of an array's items, or None if it is not described."""
    for part in _alternatives(schema):
        if isinstance(part.get("items"), dict):
            return cast("dict[str, Any]", part["items"])
    return None


def _alternatives(schema: Mapping[str, Any], depth: int = 0) -> list[Mapping[str, Any]]:
    found = [schema]
    for branch in _BRANCHES:
        parts = schema.get(branch)
        if isinstance(parts, list) and depth < _MAX_DEPTH:
            for part in cast("list[Any]", parts):
                if isinstance(part, dict):
                    found.extend(_alternatives(cast("dict[str, Any]", part), depth + 1))
    return found


def schema_types(schema: Mapping[str, Any] | None) -> frozenset[str]:
    """Return the JSON types that a schema allows; empty if it does not say."""
    types: set[str] = set()
    for part in _alternatives(schema or {}):
        types.update(_own_types(part))
    return frozenset(types & _TYPES)


def _own_types(schema: Mapping[str, Any]) -> list[str]:
    given = schema.get("type")
    if isinstance(given, str):
        given = [given]
    if isinstance(given, list):
        names = [name.lower() for name in cast("list[Any]", given) if isinstance(name, str)]
        return [_ALIASES.get(name, name) for name in names]
    values = schema.get("enum")
    return [_type_of(value) for value in cast("list[Any]", values)] if isinstance(values, list) else []


def _type_of(value: Any) -> str:
    if value is None:
        return "null"
    for kind, name in ((bool, "boolean"), (str, "string"), (int, "integer"), (float, "number"), (dict, "object")):
        if isinstance(value, kind):
            return name
    return "array"


def json_of(text: str, types: Collection[str]) -> str:
    """Return the JSON of a value written as text, as a type that its schema allows; a string if it is none of them.

    Args:
        text: The value.
        types: JSON types allowed; any if empty.
    """
    stripped = text.strip()
    if _fits(_kind(stripped), types):
        return stripped
    lowered = stripped.lower()
    if lowered in ("true", "false", "null") and _fits(_kind(lowered), types):
        return lowered
    if stripped[:1] in ("[", "{", "(") and not {"object", "array"}.isdisjoint(types or {"object"}):
        literal = _literal(stripped)
        if literal is not None:
            return literal
    return json.dumps(text, ensure_ascii=False)


def _kind(text: str) -> str:
    """Return the JSON type of a text, or an empty string if it is no JSON."""
    return _type_of(json.loads(text)) if text and is_json(text) else ""


def _fits(kind: str, types: Collection[str]) -> bool:
    if not types:
        return bool(kind)
    # A quoted text where a string is wanted keeps its quotes: they may be meant.
    if kind in ("", "string"):
        return False
    return kind in types or (kind == "integer" and "number" in types)


def _literal(text: str) -> str | None:
    """Return the JSON of a Python literal, which some models write for objects and arrays, or None."""
    try:
        return json.dumps(ast.literal_eval(text), ensure_ascii=False, allow_nan=False)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None


class ArgumentWriter:
    """Writes the open call's arguments as a JSON object, string values as they come."""

    def __init__(self, out: Output) -> None:
        self._out = out
        self._empty = True
        out.arguments("{")

    def key(self, key: str) -> None:
        """Begin an argument."""
        self._out.arguments(("" if self._empty else ", ") + json.dumps(key, ensure_ascii=False) + ": ")
        self._empty = False

    def raw(self, text: str) -> None:
        """Write the JSON of the argument's value."""
        self._out.arguments(text)

    def string(self, text: str) -> None:
        """Write a part of a string value, between its quotes."""
        self._out.arguments(json.dumps(text, ensure_ascii=False)[1:-1])

    def end(self) -> None:
        """End the object, and with it the call."""
        self._out.arguments("}")
        self._out.end()

    def value(self, cursor: Cursor, types: frozenset[str], ends: Markers) -> Steps[str]:
        """Read the text of a value and write its JSON; return what ended it, or an empty string at the end."""
        if types == STRING:
            self._out.arguments('"')
            marker = yield from cursor.until(ends, self.string)
            if marker:
                self._out.arguments('"')
            return marker
        text, marker = yield from cursor.collect(ends)
        if marker:
            self._out.arguments(json_of(text, types))
        return marker
