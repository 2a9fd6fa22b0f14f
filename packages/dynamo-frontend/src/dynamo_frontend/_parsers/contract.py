"""What a parser is: text in, deltas out, the same whatever the pieces."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import msgspec


class TextDelta(msgspec.Struct, frozen=True):
    """Visible text.

    Attributes:
        text: Never empty.
        reasoning: Whether it belongs to the model's reasoning instead of its answer.
    """

    text: str
    reasoning: bool = False


class ToolCallDelta(msgspec.Struct, frozen=True):
    """One whole tool call.

    Attributes:
        name: Function to call.
        arguments: JSON text of its arguments.
    """

    name: str
    arguments: str


ParsedDelta = TextDelta | ToolCallDelta
"""What a parser gives."""


class OutputParser(Protocol):
    """Parser of one choice.

    The sequence of deltas, neighbouring texts joined, must not depend on how the text was cut into pieces, and text may
    be withheld only while it may be the beginning of a marker.
    """

    def feed(self, text: str) -> Sequence[ParsedDelta]:
        """Take the next text."""
        ...

    def finish(self) -> Sequence[ParsedDelta]:
        """The text has ended: return what is left. Nothing is lost silently."""
        ...


class ParserFactory(Protocol):
    """Entry of ``dynamo_core.parsers``."""

    def __call__(self) -> OutputParser:
        """Return a parser for one choice."""
        ...
