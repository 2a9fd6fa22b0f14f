"""Tool calls between an opening and a closing marker: one scanner, a reader of the body for each family."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from dynamo_frontend._parsers.contract import ParsedDelta, TextDelta, ToolCallDelta, Tools
from dynamo_frontend._parsers.markers import MarkerScanner

BodyReader = Callable[[str, Tools], list[ToolCallDelta]]
"""Reads what stands between the markers; an empty list says that it is no call."""


class TaggedToolParser:
    """Parser of calls between markers.

    Calls are given once their body is complete. A body that is no call is given back as text, markers included, so that
    nothing the model wrote is lost. White space around calls is part of the markup.

    Args:
        opening: Begins a body.
        closing: Ends it; empty if it goes on to the end of the text.
        read: Reads a body.
        tools: The request's tools.
        special: Whether the markers are special tokens.
    """

    def __init__(
        self, opening: str, closing: str, read: BodyReader, tools: Tools = (), *, special: bool = False
    ) -> None:
        self.needs_special_tokens = special
        self._opening = opening
        self._closing = closing
        self._read = read
        self._tools = tools
        self._scanner = MarkerScanner()
        self._body: list[str] | None = None
        self._blank = ""
        self._after_call = False

    def feed(self, text: str) -> Sequence[ParsedDelta]:
        """Take the next text."""
        found: list[ParsedDelta] = []
        while True:
            if self._body is not None and not self._closing:
                self._body.append(self._scanner.take() + text)
                return found
            before, hit = self._scanner.scan(text, self._opening if self._body is None else self._closing)
            self._take(before, found)
            if not hit:
                return found
            text = ""
            if self._body is None:
                self._blank = ""
                self._body = []
            else:
                self._end_body("".join(self._body), self._closing, found)

    def finish(self) -> Sequence[ParsedDelta]:
        """Return what was held back; an unfinished body that already reads as calls counts."""
        found: list[ParsedDelta] = []
        rest = self._scanner.take()
        if self._body is not None:
            self._end_body("".join(self._body) + rest, "", found)
            return found
        self._take(rest, found)
        if self._blank and not self._after_call:
            found.append(TextDelta(self._blank))
        return found

    def _end_body(self, body: str, closing: str, found: list[ParsedDelta]) -> None:
        self._body = None
        self._after_call = True
        calls = self._read(body, self._tools)
        found.extend(calls or [TextDelta(f"{self._opening}{body}{closing}")])

    def _take(self, text: str, found: list[ParsedDelta]) -> None:
        if self._body is not None:
            self._body.append(text)
            return
        # White space before a call belongs to it; it is given only once other text follows.
        text = self._blank + text
        visible = text.rstrip()
        self._blank = text[len(visible) :]
        if visible:
            self._after_call = False
            found.append(TextDelta(visible))


class WholeTextToolParser:
    """Parser for families whose whole answer is a call, without an opening marker.

    An answer that does not begin like a call passes through at once.

    Args:
        begins: What a call's text begins with.
        read: Reads the text.
        tools: The request's tools.
    """

    needs_special_tokens = False

    def __init__(self, begins: Sequence[str], read: BodyReader, tools: Tools = ()) -> None:
        self._begins = tuple(begins)
        self._read = read
        self._tools = tools
        self._held: list[str] | None = []

    def feed(self, text: str) -> Sequence[ParsedDelta]:
        """Take the next text."""
        if self._held is None:
            return [TextDelta(text)] if text else []
        self._held.append(text)
        whole = "".join(self._held)
        start = whole.lstrip()
        if not start or any(start.startswith(begin[: len(start)]) for begin in self._begins):
            return []
        self._held = None
        return [TextDelta(whole)]

    def finish(self) -> Sequence[ParsedDelta]:
        """Return the calls, or the text if it is none."""
        whole = "".join(self._held or [])
        self._held = None
        if not whole:
            return []
        return self._read(whole, self._tools) or [TextDelta(whole)]
