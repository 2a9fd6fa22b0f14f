"""Calls of MiniMax M3: nested elements, each tag behind a namespace token.

``NS<tool_call>NS<invoke name="f">NS<city>ParisNS</city>NS</invoke>NS</tool_call>`` with ``NS`` for ``]<]minimax[>[``.
An element's value is text, elements by property name, or ``item`` elements of an array.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from dynamo_core.parsing import ParserContext
from dynamo_frontend._parsers.machine import BLANKS, MAX_BLANK, Cursor, Markers, Steps
from dynamo_frontend._parsers.typed import (
    STRING,
    ArgumentWriter,
    item_schema,
    json_of,
    property_schema,
    schema_types,
    tool_schema,
)

_NAMESPACE = "]<]minimax[>["
_OPEN = _NAMESPACE + "<tool_call>"
_CLOSE = _NAMESPACE + "</tool_call>"
_INVOKE = _NAMESPACE + '<invoke name="'
_INVOKE_END = _NAMESPACE + "</invoke>"
_STARTS = Markers(_OPEN, _CLOSE)
_TAGS = Markers(_NAMESPACE + "<")
_TAG_ENDS = Markers(">")
_CALL_ENDS = Markers(_INVOKE_END, _CLOSE)
_ITEM = "item"
_MAX_DEPTH = 64
TEXTS = (_NAMESPACE, _OPEN, _CLOSE, _INVOKE, _INVOKE_END)


def minimax_m3(cursor: Cursor, context: ParserContext) -> Steps[None]:
    """Read the output of one choice."""
    while marker := (yield from cursor.prose(_STARTS)):
        invoke = ""
        if marker == _OPEN:
            cursor.mark()
            yield from cursor.spaces(MAX_BLANK)
            invoke = yield from cursor.accept(_INVOKE)
            cursor.out.text(cursor.release() if not invoke else "")
        while invoke:
            yield from _call(cursor, context)
            yield from cursor.spaces(MAX_BLANK)
            invoke = yield from cursor.accept(_INVOKE)


def _call(cursor: Cursor, context: ParserContext) -> Steps[None]:
    cursor.mark()
    name = (yield from cursor.name('"'))[0]
    if not name or not (yield from cursor.accept(">")):
        yield from cursor.give_back()
        return
    cursor.release()
    cursor.out.start(name)
    writer = ArgumentWriter(cursor.out)
    if (yield from _arguments(cursor, writer, tool_schema(context, name))):
        writer.end()
    elif (yield from cursor.until(_CALL_ENDS, cursor.out.arguments)):
        cursor.out.end()


def _arguments(cursor: Cursor, writer: ArgumentWriter, schema: Mapping[str, Any]) -> Steps[bool]:
    """Write the elements of a call up to its end; return whether it is whole."""
    while True:
        yield from cursor.spaces()
        tag = yield from _tag(cursor)
        if tag == "/invoke":
            return True
        if not tag or tag.startswith("/"):
            return False
        writer.key(tag)
        child = property_schema(schema, tag)
        if schema_types(child) == STRING:
            end = yield from writer.value(cursor, STRING, Markers(f"{_NAMESPACE}</{tag}>"))
            if not end:
                return False
            continue
        value = yield from _element(cursor, tag, child, 0)
        if not value:
            return False
        writer.raw(value)


def _tag(cursor: Cursor) -> Steps[str]:
    """Take a tag; return its name, or an empty string if there is none."""
    if not (yield from cursor.accept(_NAMESPACE + "<")):
        return ""
    name, end = yield from cursor.collect(_TAG_ENDS)
    return name.strip() if end else ""


def _element(cursor: Cursor, name: str, schema: Mapping[str, Any] | None, depth: int) -> Steps[str]:
    """Read an element whose opening tag is taken; return the JSON of its value, or an empty string if it is none."""
    text, opening = yield from cursor.collect(_TAGS)
    if not opening or depth > _MAX_DEPTH:
        return ""
    cursor.at -= len(opening)
    tag = yield from _tag(cursor)
    if tag == f"/{name}":
        return _leaf(text, schema)
    names: list[str] = []
    values: list[str] = []
    while tag and not tag.startswith("/"):
        is_item = tag == _ITEM
        child = (item_schema(schema or {}) if is_item else None) or property_schema(schema or {}, tag)
        value = yield from _element(cursor, tag, child, depth + 1)
        if not value:
            return ""
        names.append(tag)
        values.append(value)
        yield from cursor.spaces()
        tag = yield from _tag(cursor)
    if tag != f"/{name}" or text.strip(BLANKS):
        return ""
    return _container(names, values, schema)


def _container(names: list[str], values: list[str], schema: Mapping[str, Any] | None) -> str:
    """Return the JSON of an array's items, or of an object's properties; a property that repeats is an array."""
    types = schema_types(schema)
    if set(names) == {_ITEM} and ("array" in types or "object" not in types):
        return f"[{', '.join(values)}]"
    found: dict[str, list[str]] = {}
    for name, value in zip(names, values, strict=True):
        found.setdefault(name, []).append(value)
    pairs = (f"{json.dumps(name, ensure_ascii=False)}: {_joined(same)}" for name, same in found.items())
    return "{" + ", ".join(pairs) + "}"


def _joined(values: list[str]) -> str:
    return values[0] if len(values) == 1 else f"[{', '.join(values)}]"


def _leaf(text: str, schema: Mapping[str, Any] | None) -> str:
    types = schema_types(schema)
    if not text.strip():
        for kind, empty in (("null", "null"), ("array", "[]"), ("object", "{}")):
            if kind in types:
                return empty
    return json_of(text, types or STRING)
