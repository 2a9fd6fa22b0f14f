"""Reasoning first, then tool calls in what is left."""

from __future__ import annotations

from collections.abc import Sequence

from dynamo_core import plugins
from dynamo_frontend._parsers.contract import OutputParser, ParsedDelta, ParserFactory, TextDelta


class ParserChain:
    """One choice's parsers in order. Tool calls are not looked for inside reasoning."""

    def __init__(self, reasoning: OutputParser | None, tools: OutputParser | None) -> None:
        self._reasoning = reasoning
        self._tools = tools
        parts = [part for part in (reasoning, tools) if part is not None]
        self.needs_special_tokens = any(part.needs_special_tokens for part in parts)

    def feed(self, text: str) -> Sequence[ParsedDelta]:
        """Take the next text."""
        if self._reasoning is None:
            return self._tools.feed(text) if self._tools is not None else [TextDelta(text)]
        return self._through_tools(self._reasoning.feed(text))

    def finish(self) -> Sequence[ParsedDelta]:
        """Return what both held back."""
        found = list(self._through_tools(self._reasoning.finish())) if self._reasoning is not None else []
        if self._tools is not None:
            found.extend(self._tools.finish())
        return found

    def _through_tools(self, deltas: Sequence[ParsedDelta]) -> Sequence[ParsedDelta]:
        if self._tools is None:
            return deltas
        found: list[ParsedDelta] = []
        for delta in deltas:
            if isinstance(delta, TextDelta) and not delta.reasoning:
                found.extend(self._tools.feed(delta.text))
            else:
                found.append(delta)
        return found


def load_parser(name: str) -> ParserFactory:
    """Return a parser by name.

    Raises:
        ConfigurationError: with the installed names, if there is none of this name.
    """
    factory: ParserFactory = plugins.load("parsers", name)
    return factory
