"""JSON as models write it: values passed on as they come, and objects that stand for calls."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection

from dynamo_frontend._parsers.machine import MAX_BLANK, MAX_NAME, Cursor, Steps, is_json

_PLAIN = re.compile(r"[\s\w+\-.,:]*")
_STRING = re.compile(r'[^"\\\x00-\x1f]*')
_SCALAR = re.compile(r"[-+.\w]*")
_CLOSERS = {"{": "}", "[": "]"}
_HEAD_KEYS = frozenset({"name", "arguments", "parameters", "type", "id"})
_ARGUMENT_KEYS = frozenset({"arguments", "parameters"})


class _Lexer:
    """Finds where a value ends. Control characters in strings, which JSON forbids and models write, are escaped."""

    def __init__(self) -> None:
        self._closers: list[str] = []
        self._step = self._plain
        self.done = False
        self.broken = False

    def scan(self, text: str, at: int) -> tuple[str, int]:
        """Return the value's text from ``at`` on, and where it ended."""
        pieces: list[str] = []
        while at < len(text) and not self.done and not self.broken:
            piece, at = self._step(text, at)
            pieces.append(piece)
        return "".join(pieces), at

    def end(self) -> bool:
        """The text has ended: return whether the value has, as a number does."""
        return self.done or (self._step == self._scalar and not self.broken)

    def _string(self, text: str, at: int) -> tuple[str, int]:
        found = _STRING.match(text, at)
        end = found.end() if found else at
        if end == len(text):
            return text[at:], end
        char = text[end]
        if char == '"':
            self._step = self._plain
            self.done = not self._closers
        elif char == "\\":
            self._step = self._escaped
        else:
            return text[at:end] + json.dumps(char)[1:-1], end + 1
        return text[at : end + 1], end + 1

    def _escaped(self, text: str, at: int) -> tuple[str, int]:
        self._step = self._string
        # An escaped line break is the line break.
        return json.dumps(text[at])[2:-1] if text[at] in "\r\n\t" else text[at], at + 1

    def _scalar(self, text: str, at: int) -> tuple[str, int]:
        found = _SCALAR.match(text, at)
        end = found.end() if found else at
        self.done = end < len(text)
        return text[at:end], end

    def _plain(self, text: str, at: int) -> tuple[str, int]:
        char = text[at]
        if char == '"':
            self._step = self._string
        elif char in _CLOSERS:
            self._closers.append(_CLOSERS[char])
        elif self._closers and char == self._closers[-1]:
            self._closers.pop()
            self.done = not self._closers
        else:
            return self._between(text, at)
        return char, at + 1

    def _between(self, text: str, at: int) -> tuple[str, int]:
        if not self._closers:
            self._step = self._scalar
            self.broken = not _SCALAR.fullmatch(text[at])
            return "", at
        found = _PLAIN.match(text, at)
        end = found.end() if found else at
        self.broken = end == at
        return text[at:end], end


def json_value(cursor: Cursor, emit: Callable[[str], None], limit: int | None = None) -> Steps[bool]:
    """Give a JSON value to ``emit`` as it comes.

    Returns:
        Whether it is whole: False if it breaks off, is none, or has more than ``limit`` characters.
    """
    lexer = _Lexer()
    size = 0
    while True:
        text, cursor.at = lexer.scan(cursor.text, cursor.at)
        size += len(text)
        if text:
            emit(text)
        if limit is not None and size > limit:
            return False
        if lexer.done:
            return True
        if lexer.broken or not (yield from cursor.more()):
            return lexer.end()


def json_text(cursor: Cursor, limit: int | None = None) -> Steps[str]:
    """Return a JSON value's text; empty if it is not whole."""
    taken: list[str] = []
    whole = yield from json_value(cursor, taken.append, limit)
    return "".join(taken) if whole else ""


def arguments_value(cursor: Cursor) -> Steps[bool]:
    """Pass on the open call's arguments; return False if they break off.

    A string is taken for encoded JSON, null for no arguments.
    """
    if (yield from cursor.peek()) in ("{", "["):
        return (yield from json_value(cursor, cursor.out.arguments))
    text = yield from json_text(cursor)
    cursor.out.arguments(_decoded(text))
    return bool(text)


def _decoded(text: str) -> str:
    """Return the JSON text that a value given as arguments stands for."""
    if text[:1] not in ("n", '"'):
        return text
    value = json.loads(text) if is_json(text) else text
    if value is None or value == "":
        return "{}"
    return value if isinstance(value, str) and is_json(value) else text


class CallObject:
    """Reads one object that stands for a call: ``{"name": ..., "arguments": {...}}``.

    Args:
        cursor: Where to read; it must have a mark, which goes as soon as the object is a call.
        bare: Whether nothing but its looks says that the object is a call: then it must begin as one, with known keys
            and its name before its arguments.
        names: Functions that a bare object may call; any if empty.
    """

    def __init__(self, cursor: Cursor, *, bare: bool = False, names: Collection[str] = ()) -> None:
        self._cursor = cursor
        self._limit = MAX_NAME if bare else None
        self._names = names if bare else ()
        self._name = ""
        self._arguments = ""
        self._made = False

    def read(self) -> Steps[bool]:
        """Read the object at the cursor.

        Returns:
            Whether it is a call. The call is still open if it broke off.
        """
        self._cursor.at += 1
        while (yield from self._entry()):
            char = yield from self._char()
            if char not in (",", "}"):
                break
            self._cursor.at += 1
            if char == "}":
                self._finish()
                break
        return self._made

    def _char(self) -> Steps[str]:
        yield from self._cursor.spaces(MAX_BLANK if self._limit else None)
        return (yield from self._cursor.peek())

    def _entry(self) -> Steps[bool]:
        """Read a key and its value; return whether the object may go on."""
        char = yield from self._char()
        if char != '"':
            return char == "}"
        key = (yield from json_text(self._cursor, self._limit))[1:-1]
        if (yield from self._char()) != ":" or (self._limit and key not in _HEAD_KEYS):
            return False
        self._cursor.at += 1
        char = yield from self._char()
        if key in _ARGUMENT_KEYS and not self._made and not self._arguments:
            return (yield from self._read_arguments(char))
        text = yield from json_text(self._cursor, None if self._made else self._limit)
        if key == "name" and not self._name:
            return self._take_name(text)
        return bool(text)

    def _take_name(self, text: str) -> bool:
        name = json.loads(text) if text.startswith('"') and is_json(text) else ""
        self._name = name if len(name) <= MAX_NAME else ""
        return bool(self._name) and (not self._names or self._name in self._names)

    def _read_arguments(self, char: str) -> Steps[bool]:
        if self._limit and not (self._name and char == "{"):
            return False
        if not self._name:
            self._arguments = yield from json_text(self._cursor)
            return bool(self._arguments)
        self._start()
        whole = yield from arguments_value(self._cursor)
        if whole:
            self._cursor.out.end()
        return whole

    def _start(self) -> None:
        self._cursor.release()
        self._cursor.out.start(self._name)
        self._made = True

    def _finish(self) -> None:
        if self._made or not self._name or self._limit:
            return
        self._start()
        self._cursor.out.arguments(_decoded(self._arguments) if self._arguments else "{}")
        self._cursor.out.end()


def call_sequence(cursor: Cursor, *, opened: bool = False) -> Steps[bool]:
    """Read the calls behind a marker: an object, several, or an array of them.

    Args:
        cursor: Where to read; it must have a mark, which is there no more once a call was read.
        opened: Whether the marker included the array's opening bracket.

    Returns:
        Whether there were only calls. The last one is still open if it broke off.
    """
    bracketed = opened
    while True:
        char = yield from cursor.peek()
        if char == "{":
            if not (yield from CallObject(cursor).read()):
                return False
            if cursor.out.calling:
                return True
            cursor.mark()
        elif char == "[" and not bracketed:
            bracketed = True
            cursor.at += 1
        elif char == "]" and bracketed:
            cursor.at += 1
            return True
        elif char and char in ",; \t\r\n":
            cursor.at += 1
        else:
            return not (char and bracketed)
