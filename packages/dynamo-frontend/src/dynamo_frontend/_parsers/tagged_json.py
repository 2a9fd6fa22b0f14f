"""Calls as JSON behind a marker: ``hermes``, ``jamba``, ``nemotron_deci`` and ``phi4``."""

from __future__ import annotations

from dynamo_core.parsing import ParserContext
from dynamo_frontend._parsers.json_text import call_sequence
from dynamo_frontend._parsers.machine import BLANKS, MAX_BLANK, Cursor, Markers, Steps


class TaggedJson:
    """Grammar of calls between two markers.

    What follows an opening marker tells calls from prose that mentions the marker: prose keeps it. A body that begins
    like a call and is none is given as text without its markers.

    Args:
        open_tag: Begins the calls. If it ends with a bracket, an array follows without one.
        close_tag: Ends them; empty if nothing does.
    """

    def __init__(self, open_tag: str, close_tag: str = "") -> None:
        self.texts = (open_tag, close_tag) if close_tag else (open_tag,)
        self._opened = open_tag.endswith("[")
        self._starts = "{]" if self._opened else "{["
        self._open = Markers(open_tag)
        self._end = Markers(close_tag) if close_tag else self._open
        self._either = Markers(*self.texts)
        self._close_tag = close_tag

    def __call__(self, cursor: Cursor, context: ParserContext) -> Steps[None]:
        """Read the output of one choice."""
        marker = yield from cursor.prose(self._open)
        while marker:
            marker = yield from self._calls(cursor, marker)
            if not marker or marker == self._close_tag:
                marker = yield from cursor.prose(self._open)

    def _calls(self, cursor: Cursor, marker: str) -> Steps[str]:
        """Read what stands behind an opening marker; return the marker where reading stopped, if it was one."""
        cursor.mark()
        yield from cursor.spaces(MAX_BLANK)
        start = yield from cursor.peek()
        if start and start not in self._starts:
            yield from cursor.give_back(marker)
            return ""
        only_calls = yield from call_sequence(cursor, opened=self._opened)
        if cursor.out.calling:
            cursor.release()
            return (yield from self._broken_call(cursor))
        if only_calls:
            return (yield from self._after_calls(cursor))
        yield from cursor.give_back()
        return (yield from cursor.prose(self._either))

    def _after_calls(self, cursor: Cursor) -> Steps[str]:
        gap = cursor.release()
        if self._close_tag and (marker := (yield from cursor.accept(self._close_tag))):
            return marker
        if not gap.strip(BLANKS):
            cursor.out.text(gap)
        return ""

    def _broken_call(self, cursor: Cursor) -> Steps[str]:
        """Give the rest of a call that is no JSON as its arguments, so that the client sees what the model wrote."""
        marker = yield from cursor.until(self._end, cursor.out.arguments)
        cursor.out.end()
        return marker


HERMES_JSON = TaggedJson("<tool_call>", "</tool_call>")
JAMBA_JSON = TaggedJson("<tool_calls>", "</tool_calls>")
NEMOTRON_DECI_JSON = TaggedJson("<TOOLCALL>", "</TOOLCALL>")
PHI4_JSON = TaggedJson("functools[")
