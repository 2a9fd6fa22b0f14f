"""Calls of Qwen3-Coder: ``<tool_call><function=NAME><parameter=KEY>VALUE</parameter></function></tool_call>``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dynamo_core.parsing import ParserContext
from dynamo_frontend._parsers.machine import MAX_BLANK, Cursor, Markers, Steps
from dynamo_frontend._parsers.typed import STRING, ArgumentWriter, property_schema, schema_types, tool_schema

_OPEN = "<tool_call>"
_CLOSE = "</tool_call>"
_FUNCTION = "<function="
_FUNCTION_END = "</function>"
_PARAMETER = "<parameter="
_PARAMETER_END = "</parameter>"
_STARTS = Markers(_OPEN, _FUNCTION)
_ALL_END = f"\n{_FUNCTION_END}\n{_CLOSE}"
# The line break before a closing tag is no part of the value. Where a parameter's own end is missing, the next one's
# beginning or the end of the whole call ends it, each on a line of its own.
_ENDS = Markers("\n" + _PARAMETER_END, _PARAMETER_END, "\n" + _PARAMETER, _ALL_END)
_KEY_END = Markers(">")
_CALL_ENDS = Markers(_FUNCTION_END, _CLOSE)
TEXTS = (_OPEN, _CLOSE, _FUNCTION, _FUNCTION_END, _PARAMETER, _PARAMETER_END)


def qwen3_coder(cursor: Cursor, context: ParserContext) -> Steps[None]:
    """Read the output of one choice. The outer tags may be missing."""
    while marker := (yield from cursor.prose(_STARTS)):
        cursor.mark()
        name = yield from _name(cursor, marker)
        if not name:
            yield from cursor.give_back(marker)
            continue
        cursor.release()
        cursor.out.start(name)
        yield from _parameters(cursor, tool_schema(context, name))
        yield from _outer_end(cursor)


def _name(cursor: Cursor, marker: str) -> Steps[str]:
    """Read up to the parameters; return the function's name, or an empty string if there is none."""
    if marker == _OPEN:
        yield from cursor.spaces(MAX_BLANK)
        marker = yield from cursor.accept(_FUNCTION)
    return (yield from cursor.name(">"))[0] if marker else ""


def _outer_end(cursor: Cursor) -> Steps[None]:
    cursor.mark()
    yield from cursor.spaces(MAX_BLANK)
    if (yield from cursor.accept(_CLOSE)):
        cursor.release()
    else:
        cursor.rewind()


def _parameters(cursor: Cursor, schema: Mapping[str, Any]) -> Steps[None]:
    writer = ArgumentWriter(cursor.out)
    tag = yield from _next_tag(cursor)
    while tag == _PARAMETER:
        tag = yield from _parameter(cursor, writer, schema)
    if tag == _FUNCTION_END:
        writer.end()
        return
    # Neither a parameter nor the end: the call cannot be told any more, and the client sees what the model wrote.
    if (yield from cursor.until(_CALL_ENDS, cursor.out.arguments)):
        cursor.out.end()


def _parameter(cursor: Cursor, writer: ArgumentWriter, schema: Mapping[str, Any]) -> Steps[str]:
    """Write a parameter whose tag is taken; return the tag after it."""
    key, end = yield from cursor.collect(_KEY_END)
    if not end:
        return ""
    writer.key(key)
    yield from cursor.accept("\n")
    end = yield from writer.value(cursor, schema_types(property_schema(schema, key)) or STRING, _ENDS)
    if end.endswith(_PARAMETER_END):
        return (yield from _next_tag(cursor))
    if end == _ALL_END:
        cursor.at -= len(_CLOSE) + 1
        return _FUNCTION_END
    return end.lstrip()


def _next_tag(cursor: Cursor) -> Steps[str]:
    yield from cursor.spaces()
    return (yield from cursor.accept(_PARAMETER, _FUNCTION_END))
