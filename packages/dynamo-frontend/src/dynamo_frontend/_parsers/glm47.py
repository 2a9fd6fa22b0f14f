"""Calls of GLM: ``<tool_call>NAME<arg_key>KEY</arg_key><arg_value>VALUE</arg_value></tool_call>``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dynamo_core.parsing import ParserContext
from dynamo_frontend._parsers.machine import Cursor, Markers, Steps
from dynamo_frontend._parsers.typed import ArgumentWriter, property_schema, schema_types, tool_schema

_OPEN = "<tool_call>"
_CLOSE = "</tool_call>"
_KEY = "<arg_key>"
_KEY_END = "</arg_key>"
_VALUE = "<arg_value>"
_VALUE_END = "</arg_value>"
_STARTS = Markers(_OPEN)
_ENDS = Markers(_CLOSE)
_KEY_ENDS = Markers(_KEY_END)
_VALUE_ENDS = Markers(_VALUE_END)
TEXTS = (_OPEN, _CLOSE, _KEY, _KEY_END, _VALUE, _VALUE_END)


def glm47(cursor: Cursor, context: ParserContext) -> Steps[None]:
    """Read the output of one choice."""
    while marker := (yield from cursor.prose(_STARTS)):
        cursor.mark()
        name, end = yield from cursor.name(_KEY, _CLOSE)
        if not name:
            yield from cursor.give_back(marker)
            continue
        cursor.release()
        cursor.out.start(name)
        writer = ArgumentWriter(cursor.out)
        while end == _KEY and (yield from _argument(cursor, writer, tool_schema(context, name))):
            yield from cursor.spaces()
            end = yield from cursor.accept(_KEY, _CLOSE)
        if end == _CLOSE:
            writer.end()
        elif (yield from cursor.until(_ENDS, cursor.out.arguments)):
            cursor.out.end()


def _argument(cursor: Cursor, writer: ArgumentWriter, schema: Mapping[str, Any]) -> Steps[bool]:
    """Read a key and its value; return whether both are whole."""
    key, end = yield from cursor.collect(_KEY_ENDS)
    yield from cursor.spaces()
    if not end or not (yield from cursor.accept(_VALUE)):
        return False
    key = key.strip()
    writer.key(key)
    types = schema_types(property_schema(schema, key))
    return bool((yield from writer.value(cursor, types, _VALUE_ENDS)))
