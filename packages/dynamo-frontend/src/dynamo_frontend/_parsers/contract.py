"""What a reply asks of the parsers of one choice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from dynamo_core import parsing
from dynamo_core.parsing import ParsedDelta

Tools = Sequence[Mapping[str, Any]]
"""Tool specifications of the request, in OpenAI's form."""


class OutputParser(parsing.OutputParser, Protocol):
    """Parser of one choice that says which tokens its text must show."""

    @property
    def needs_special_tokens(self) -> bool:
        """Whether its markers are special tokens of the tokenizer, which are otherwise left out of the text."""
        ...


__all__ = ["OutputParser", "ParsedDelta", "Tools"]
