"""Reasoning between tags, as most models write it."""

from __future__ import annotations

from collections.abc import Sequence

from dynamo_frontend._parsers.contract import ParsedDelta, TextDelta
from dynamo_frontend._parsers.markers import MarkerScanner


class TaggedReasoning:
    """Splits ``<think>`` reasoning from the answer.

    Args:
        open_tag: Begins the reasoning.
        close_tag: Ends it.
        starts_inside: Whether the output begins in the reasoning, since the template already opened it.
    """

    needs_special_tokens = False

    def __init__(self, open_tag: str = "<think>", close_tag: str = "</think>", *, starts_inside: bool = False) -> None:
        self._open = open_tag
        self._close = close_tag
        self._inside = starts_inside
        self._strip_newlines = starts_inside
        self._scanner = MarkerScanner()

    def feed(self, text: str) -> Sequence[ParsedDelta]:
        """Take the next text."""
        found: list[ParsedDelta] = []
        while True:
            marker = self._close if self._inside else self._open
            before, hit = self._scanner.scan(text, marker)
            self._emit(before, found)
            if not hit:
                return found
            self._inside = not self._inside
            self._strip_newlines = True
            text = ""

    def finish(self) -> Sequence[ParsedDelta]:
        """Return what was held back."""
        found: list[ParsedDelta] = []
        self._emit(self._scanner.take(), found)
        return found

    def _emit(self, text: str, found: list[ParsedDelta]) -> None:
        if self._strip_newlines:
            # The line break after a tag belongs to the markup.
            text = text.lstrip("\n")
            self._strip_newlines = not text
        if text:
            found.append(TextDelta(text, reasoning=self._inside))
