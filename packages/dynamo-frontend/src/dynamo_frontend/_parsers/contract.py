"""What a reply takes from the parsers: text, and calls as a whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import msgspec

from dynamo_core.parsing import TextDelta


class ToolCallDelta(msgspec.Struct, frozen=True):
    """One whole tool call.

    Attributes:
        name: Function to call.
        arguments: JSON text of its arguments; cut off where the model was.
    """

    name: str
    arguments: str


ParsedDelta = TextDelta | ToolCallDelta
"""What a reply is made of."""


class OutputParser(Protocol):
    """Parser of one choice, whose calls are whole."""

    def feed(self, text: str) -> Sequence[ParsedDelta]:
        """Take the next text."""
        ...

    def finish(self) -> Sequence[ParsedDelta]:
        """The text has ended: return what is left."""
        ...


__all__ = ["OutputParser", "ParsedDelta", "TextDelta", "ToolCallDelta"]
