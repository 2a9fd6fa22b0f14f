"""What a reply takes from the parsers: text, and calls as a whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import msgspec

from dynamo_core.parsing import TextDelta

Tools = Sequence[Mapping[str, Any]]
"""Tool specifications of the request, in OpenAI's form."""


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

    @property
    def needs_special_tokens(self) -> bool:
        """Whether its markers are special tokens of the tokenizer, which are otherwise left out of the text."""
        ...

    def feed(self, text: str) -> Sequence[ParsedDelta]:
        """Take the next text."""
        ...

    def finish(self) -> Sequence[ParsedDelta]:
        """The text has ended: return what is left."""
        ...


__all__ = ["OutputParser", "ParsedDelta", "TextDelta", "ToolCallDelta", "Tools"]
