"""What a parser is: text in, deltas out, the same whatever the pieces."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import msgspec

Tools = Sequence[Mapping[str, Any]]
"""Tool specifications of the request, in OpenAI's form."""


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
    be withheld only while it may be the beginning of a marker, or is part of a call that is not complete.
    """

    @property
    def needs_special_tokens(self) -> bool:
        """Whether its markers are special tokens of the tokenizer, which are otherwise left out of the text."""
        ...

    def feed(self, text: str) -> Sequence[ParsedDelta]:
        """Take the next text."""
        ...

    def finish(self) -> Sequence[ParsedDelta]:
        """The text has ended: return what is left. Nothing is lost silently."""
        ...


class ParserFactory(Protocol):
    """Entry of ``dynamo_core.parsers``."""

    def __call__(self, tools: Tools) -> OutputParser:
        """Return a parser for one choice; ``tools`` is empty for a reasoning parser."""
        ...
