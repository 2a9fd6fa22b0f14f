"""Calls of Gemma 4: ``<|tool_call>call:NAME{KEY:VALUE,...}<tool_call|>``, strings between ``<|"|>``, keys without."""

from __future__ import annotations

import json
import re

from dynamo_core.parsing import ParserContext
from dynamo_frontend._parsers.machine import MAX_BLANK, Cursor, Markers, Steps
from dynamo_frontend._parsers.typed import UNKNOWN, json_of

_OPEN = "<|tool_call>"
_CLOSE = "<tool_call|>"
_QUOTE = '<|"|>'
_STARTS = Markers(_OPEN, _CLOSE)
_ENDS = Markers(_CLOSE)
_QUOTES = Markers(_QUOTE)
_WORD = re.compile(r"[^,:\[\]{}<]")
_NULLS = frozenset({"none", "nil"})
_MAX_DEPTH = 64
TEXTS = (_OPEN, _CLOSE, _QUOTE)


def gemma4(cursor: Cursor, context: ParserContext) -> Steps[None]:
    """Read the output of one choice."""
    while marker := (yield from cursor.prose(_STARTS)):
        if marker == _CLOSE:
            continue
        cursor.mark()
        yield from cursor.spaces(MAX_BLANK)
        head = yield from cursor.accept("call:")
        name = (yield from cursor.name("{"))[0] if head else ""
        if not name:
            yield from cursor.give_back()
            continue
        cursor.release()
        cursor.out.start(name)
        if (yield from _object(cursor, 0)):
            cursor.out.end()
            yield from cursor.spaces(MAX_BLANK)
            yield from cursor.accept(_CLOSE)
        elif (yield from cursor.until(_ENDS, cursor.out.arguments)):
            cursor.out.end()


def _object(cursor: Cursor, depth: int) -> Steps[bool]:
    """Write an object whose bracket is taken; return whether it is whole."""
    out = cursor.out
    out.arguments("{")
    separator = ""
    while True:
        yield from cursor.spaces()
        if (yield from cursor.accept("}")):
            out.arguments("}")
            return True
        if separator and not (yield from cursor.accept(",")):
            return False
        yield from cursor.spaces()
        key = yield from _key(cursor)
        yield from cursor.spaces()
        if not key or not (yield from cursor.accept(":")):
            return False
        out.arguments(f"{separator}{json.dumps(key, ensure_ascii=False)}: ")
        if not (yield from _value(cursor, depth)):
            return False
        separator = ", "


def _array(cursor: Cursor, depth: int) -> Steps[bool]:
    """Write an array whose bracket is taken; return whether it is whole."""
    cursor.out.arguments("[")
    separator = ""
    while True:
        yield from cursor.spaces()
        if (yield from cursor.accept("]")):
            cursor.out.arguments("]")
            return True
        if separator and not (yield from cursor.accept(",")):
            return False
        cursor.out.arguments(separator)
        if not (yield from _value(cursor, depth)):
            return False
        separator = ", "


def _key(cursor: Cursor) -> Steps[str]:
    if (yield from cursor.accept(_QUOTE)):
        text, end = yield from cursor.collect(_QUOTES)
        return text if end else ""
    return (yield from _word(cursor))


def _value(cursor: Cursor, depth: int) -> Steps[bool]:
    """Write a value; return whether it is whole."""
    yield from cursor.spaces()
    opening = yield from cursor.accept(_QUOTE, "{", "[")
    if opening == _QUOTE:
        cursor.out.arguments('"')
        end = yield from cursor.until(_QUOTES, lambda text: cursor.out.arguments(_escaped(text)))
        cursor.out.arguments('"' if end else "")
        return bool(end)
    if opening:
        return depth < _MAX_DEPTH and (yield from (_object if opening == "{" else _array)(cursor, depth + 1))
    word = yield from _word(cursor)
    # A word that the end of the output cut off may be half a number.
    if not word or not (yield from cursor.peek()):
        return False
    cursor.out.arguments("null" if word.lower() in _NULLS else json_of(word, UNKNOWN))
    return True


def _word(cursor: Cursor) -> Steps[str]:
    word = ""
    while (char := (yield from cursor.peek())) and _WORD.match(char):
        word += char
        cursor.at += 1
    return word.strip()


def _escaped(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]
