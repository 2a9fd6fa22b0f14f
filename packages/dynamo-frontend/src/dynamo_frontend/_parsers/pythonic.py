"""Calls as a Python list: ``[get_weather(city="Paris", days=3)]``, as Llama 4 writes them."""

from __future__ import annotations

import ast
import json
import re
from typing import Any

from dynamo_core.parsing import ParserContext
from dynamo_frontend._parsers.machine import BLANKS, MAX_BLANK, Cursor, Markers, Steps, is_json
from dynamo_frontend._parsers.typed import ArgumentWriter

_START = "<|python_start|>"
_END = "<|python_end|>"
_MARKERS = Markers("[", _START, _END)
_ENDS = Markers(_END)
_QUIET = re.compile(r"[^\"'()\[\]{}\\,]*")
_CLOSERS = {"(": ")", "[": "]", "{": "}"}
TEXTS = (_START, _END)


def pythonic(cursor: Cursor, context: ParserContext) -> Steps[None]:
    """Read the output of one choice. A list counts only where a line begins, and if it begins with a call of a tool."""
    fresh = True

    def text(piece: str) -> None:
        nonlocal fresh
        _, line_break, tail = piece.rpartition("\n")
        fresh = not tail.strip(BLANKS) and (bool(line_break) or fresh)
        cursor.out.text(piece)

    while marker := (yield from cursor.until(_MARKERS, text)):
        if marker != "[":
            continue
        if not fresh or not (yield from _calls(cursor, context)):
            text("[")
        fresh = False


def _calls(cursor: Cursor, context: ParserContext) -> Steps[bool]:
    """Read the calls of a list whose bracket is taken; return False, with nothing taken, if it begins with none."""
    made = False
    while True:
        cursor.mark()
        if not (yield from _call(cursor, context)):
            cursor.rewind()
            return made
        made = True
        if cursor.out.calling:
            # No literal, so no call that could be told; the client sees what the model wrote.
            yield from cursor.until(_ENDS, cursor.out.arguments)
            cursor.out.end()
            return True
        yield from cursor.spaces(MAX_BLANK)
        if (yield from cursor.accept(",", "]")) != ",":
            return True


def _call(cursor: Cursor, context: ParserContext) -> Steps[bool]:
    """Read one call; return False if there is none. It is still open if it broke off."""
    name = (yield from cursor.name("("))[0]
    if not name or (context.tools and name not in context.tools):
        return False
    key, end = yield from _key(cursor)
    if not end:
        return False
    cursor.release()
    cursor.out.start(name)
    writer = ArgumentWriter(cursor.out)
    while end == "=":
        writer.key(key)
        text, end = yield from _value(cursor)
        value = _json(text) if end else ""
        writer.raw(value or text)
        if value and end == ",":
            key, end = yield from _key(cursor)
        elif not value:
            return True
    if end:
        writer.end()
    return True


def _key(cursor: Cursor) -> Steps[tuple[str, str]]:
    """Read a keyword with its sign, or the call's end; the second is empty if there is neither."""
    yield from cursor.spaces(MAX_BLANK)
    if (yield from cursor.accept(")")):
        return "", ")"
    return (yield from cursor.name("="))


def _value(cursor: Cursor) -> Steps[tuple[str, str]]:
    """Return a value's text and what ended it, both taken; the end is empty if there is none."""
    taken: list[str] = []
    closers: list[str] = []
    while True:
        found = _QUIET.match(cursor.text, cursor.at)
        if found and found.group():
            taken.append(found.group())
            cursor.at = found.end()
        char = yield from cursor.peek()
        if not char or char == "\\":
            return "".join(taken), ""
        if _QUIET.fullmatch(char):
            continue
        cursor.at += 1
        if not closers and char in ",)":
            return "".join(taken), char
        taken.append(char)
        if char in "\"'":
            yield from _string(cursor, taken, char)
        elif char in _CLOSERS:
            closers.append(_CLOSERS[char])
        elif char != "," and (not closers or closers.pop() != char):
            return "".join(taken), ""


def _string(cursor: Cursor, taken: list[str], quote: str) -> Steps[None]:
    """Take the rest of a string."""
    escaped = False
    while char := (yield from cursor.peek()):
        cursor.at += 1
        taken.append(char)
        if char == quote and not escaped:
            return
        escaped = char == "\\" and not escaped


def _json(text: str) -> str:
    """Return the JSON of a literal, or an empty string if the text is none."""
    try:
        written = json.dumps(_literal(ast.parse(text.strip(), mode="eval").body), ensure_ascii=False)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return ""
    return written if is_json(written) else ""


def _literal(node: ast.expr) -> Any:
    # Models mix JSON's names for constants into Python.
    if isinstance(node, ast.Name) and node.id in ("true", "false", "null"):
        return json.loads(node.id)
    if isinstance(node, ast.List):
        return [_literal(item) for item in node.elts]
    if isinstance(node, ast.Dict):
        pairs = zip(node.keys, node.values, strict=True)
        return {ast.literal_eval(key): _literal(value) for key, value in pairs if key is not None}
    return ast.literal_eval(node)
