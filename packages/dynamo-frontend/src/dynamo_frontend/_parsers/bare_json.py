"""Calls as JSON without markers: ``default``, and ``llama3_json`` whose marker may be missing.

A call without a marker begins a line, has its name before its arguments, and names a tool of the request.
"""

from __future__ import annotations

from dynamo_core.parsing import ParserContext
from dynamo_frontend._parsers.json_text import CallObject, call_sequence
from dynamo_frontend._parsers.machine import BLANKS, MAX_BLANK, Cursor, Markers, Steps


class BareJson:
    """Grammar of calls that are told by their looks.

    Args:
        tag: Marker that may stand before calls; empty if the family has none.
        array: Whether calls may stand in an array.
    """

    def __init__(self, tag: str = "", *, array: bool = False) -> None:
        self.texts = (tag,) if tag else ()
        starts = ("{", "[") if array else ("{",)
        self._markers = Markers(*starts, *self.texts)
        self._tag = tag

    def __call__(self, cursor: Cursor, context: ParserContext) -> Steps[None]:
        """Read the output of one choice."""
        line = _Line(cursor)
        while marker := (yield from cursor.until(self._markers, line.text)):
            if marker == self._tag:
                yield from self._tagged(cursor)
            elif not line.empty or not (yield from self._bare(cursor, context)):
                line.text(marker)
                continue
            line.empty = False

    def _tagged(self, cursor: Cursor) -> Steps[None]:
        """Read what stands behind the marker; code for a built-in tool is text."""
        cursor.mark()
        yield from cursor.spaces(MAX_BLANK)
        only_calls = yield from call_sequence(cursor)
        if cursor.out.calling:
            yield from cursor.rest(cursor.out.arguments)
            return
        rest = cursor.release()
        if not only_calls or not rest.strip(";," + BLANKS):
            cursor.out.text(rest)

    def _bare(self, cursor: Cursor, context: ParserContext) -> Steps[bool]:
        """Read calls whose first bracket is taken; return False, with nothing else taken, if there are none."""
        in_array = cursor.text[cursor.at - 1] == "["
        cursor.at -= not in_array
        cursor.mark()
        if in_array:
            yield from cursor.spaces(MAX_BLANK)
        made = False
        while (yield from cursor.peek()) == "{" and (
            yield from CallObject(cursor, bare=True, names=context.tools).read()
        ):
            made = True
            if cursor.out.calling:
                yield from cursor.rest(cursor.out.arguments)
                return True
            cursor.mark()
            yield from self._separator(cursor, in_array=in_array)
        if in_array and made and (yield from cursor.accept("]")):
            cursor.release()
        else:
            cursor.rewind()
            cursor.at += not (made or in_array)
        return made

    def _separator(self, cursor: Cursor, *, in_array: bool) -> Steps[None]:
        """Take what may stand between two calls."""
        yield from cursor.spaces(MAX_BLANK)
        if (yield from cursor.accept("," if in_array else ";")):
            yield from cursor.spaces(MAX_BLANK)


class _Line:
    """Passes text on and knows whether the current line is empty so far."""

    def __init__(self, cursor: Cursor) -> None:
        self._cursor = cursor
        self.empty = True

    def text(self, text: str) -> None:
        _, line_break, tail = text.rpartition("\n")
        self.empty = not tail.strip(BLANKS) and (bool(line_break) or self.empty)
        self._cursor.out.text(text)


DEFAULT_JSON = BareJson(array=True)
LLAMA3_JSON = BareJson("<|python_tag|>")
