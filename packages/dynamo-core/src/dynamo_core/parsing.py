"""Parsers of output text: what turns a model family's own markup into reasoning, answer and tool calls.

A plug-in registers a ``ParserFamily`` under ``dynamo_core.parsers``. One implementation serves streamed and whole
replies: a whole reply is a stream that came in one piece.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import msgspec


class TextDelta(msgspec.Struct, frozen=True):
    """Visible text.

    Attributes:
        text: Never empty.
        reasoning: Whether it belongs to the model's reasoning instead of its answer.
    """

    text: str
    reasoning: bool = False


class CallStart(msgspec.Struct, frozen=True):
    """A tool call begins; its arguments follow.

    Attributes:
        name: Function to call.
    """

    name: str


class ArgumentsDelta(msgspec.Struct, frozen=True):
    """More of the arguments of the call that began last.

    Attributes:
        text: Part of a JSON text; never empty.
    """

    text: str


class CallEnd(msgspec.Struct, frozen=True):
    """The call that began last is over.

    Attributes:
        complete: Whether the model finished it. The joined arguments of a complete call are one JSON value; those of
            an incomplete one are no JSON value, so that nobody runs half a call by mistake.
    """

    complete: bool = True


ParsedDelta = TextDelta | CallStart | ArgumentsDelta | CallEnd
"""What a parser gives."""


class ParserContext(msgspec.Struct, frozen=True):
    """What a parser may know of its request.

    Attributes:
        tools: JSON schema of the parameters by function name; empty if unknown.
        reasoning_open: Whether the prompt left the reasoning open (True) or closed it (False); None if it says
            nothing, so that the family's habit counts.
    """

    tools: Mapping[str, Mapping[str, Any]] = {}
    reasoning_open: bool | None = None


class OutputParser(Protocol):
    """Parser of one choice.

    The sequence of deltas, neighbours of one kind joined, must not depend on how the text was cut into pieces. Text may
    be withheld only while it may be the beginning of a marker; a call may be withheld until its name is read.
    """

    def feed(self, text: str) -> Sequence[ParsedDelta]:
        """Take the next text."""
        ...

    def finish(self) -> Sequence[ParsedDelta]:
        """The text has ended: return what is left. An open call ends incomplete."""
        ...


class ParserFactory(Protocol):
    """Makes parsers of one kind."""

    def __call__(self, context: ParserContext) -> OutputParser:
        """Return a parser for one choice."""
        ...


class ParserFamily(msgspec.Struct, frozen=True):
    """Entry of ``dynamo_core.parsers``: the parsers of one model family.

    Attributes:
        tool_calls: Finds tool calls; None if the family has no form of its own.
        reasoning: Finds reasoning; it gives as plain text all that is for the tool-call parser. None if the family
            has no form of its own.
        markers: Texts of the markup. Tokens of these texts must reach the parsers although they are special.
        reasoning_tags: Texts that open and close the reasoning, as a prompt ends with them; empty if prompts do not.
    """

    tool_calls: ParserFactory | None = None
    reasoning: ParserFactory | None = None
    markers: frozenset[str] = frozenset()
    reasoning_tags: tuple[str, str] = ("", "")
