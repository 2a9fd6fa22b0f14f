"""Calls of Mistral models behind ``[TOOL_CALLS]``: an array of objects, or a name and its arguments.

Tokenizers before version 11 write ``[TOOL_CALLS][{"name": ..., "arguments": {...}}]``, later ones
``[TOOL_CALLS]NAME[CALL_ID]ID[ARGS]{...}`` with a marker for each call; version 13 leaves the id out.
"""

from __future__ import annotations

from dynamo_core.parsing import ParserContext
from dynamo_frontend._parsers.json_text import call_sequence, json_value
from dynamo_frontend._parsers.machine import BLANKS, MAX_BLANK, Cursor, Markers, Steps

_CALLS = "[TOOL_CALLS]"
_CALLS_END = "[/TOOL_CALLS]"
_CALL_ID = "[CALL_ID]"
_ARGUMENTS = "[ARGS]"
_MARKERS = Markers(_CALLS, _CALLS_END)
_ARGUMENTS_MARKER = Markers(_ARGUMENTS)
TEXTS = (_CALLS, _CALLS_END, _CALL_ID, _ARGUMENTS)


def mistral(cursor: Cursor, context: ParserContext) -> Steps[None]:
    """Read the output of one choice."""
    marker = yield from cursor.prose(_MARKERS)
    while marker:
        if marker == _CALLS:
            cursor.mark()
            yield from cursor.spaces(MAX_BLANK)
            is_array = (yield from cursor.peek()) in ("[", "{")
            yield from _array(cursor) if is_array else _named(cursor)
        if cursor.out.calling:
            marker = yield from cursor.until(_MARKERS, cursor.out.arguments)
            cursor.out.end()
        else:
            marker = yield from cursor.prose(_MARKERS)


def _array(cursor: Cursor) -> Steps[None]:
    only_calls = yield from call_sequence(cursor)
    if cursor.out.calling:
        cursor.release()
    elif not only_calls:
        yield from cursor.give_back()
    else:
        gap = cursor.release()
        cursor.out.text(gap if not gap.strip(BLANKS) else "")


def _named(cursor: Cursor) -> Steps[None]:
    cursor.mark()
    name, end = yield from cursor.name(_CALL_ID, _ARGUMENTS, "{")
    if not name:
        yield from cursor.give_back()
        return
    cursor.release()
    cursor.out.start(name)
    if end == "{":
        cursor.at -= 1
    elif end == _CALL_ID:
        yield from cursor.collect(_ARGUMENTS_MARKER)
    yield from cursor.spaces(MAX_BLANK)
    if (yield from json_value(cursor, cursor.out.arguments)):
        cursor.out.end()
