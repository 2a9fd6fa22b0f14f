"""Reasoning first, then tool calls in what is left."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from dynamo_core import plugins
from dynamo_core.errors import ConfigurationError
from dynamo_core.parsing import OutputParser, ParsedDelta, ParserFactory, ParserFamily, TextDelta

_TAIL_CHARS = 256
NO_PARSER = "none"
"""Name by which an operator says that no parser is to be used."""


class ParserChain:
    """One choice's parsers in order. Tool calls are not looked for inside reasoning.

    Args:
        reasoning: Finds reasoning; None without.
        tools: Finds calls in what is left; None without.
        needs_special_tokens: Whether their markers are special tokens.
    """

    def __init__(
        self, reasoning: OutputParser | None, tools: OutputParser | None, *, needs_special_tokens: bool = False
    ) -> None:
        self.needs_special_tokens = needs_special_tokens
        self._reasoning = reasoning
        self._tools = tools

    def feed(self, text: str) -> Sequence[ParsedDelta]:
        """Take the next text."""
        reasoning, tools = self._reasoning, self._tools
        if reasoning is None:
            return tools.feed(text) if tools is not None else [TextDelta(text)]
        found = reasoning.feed(text)
        return found if tools is None else self._through_tools(tools, found)

    def finish(self) -> Sequence[ParsedDelta]:
        """Return what both held back."""
        tools = self._tools
        found = self._reasoning.finish() if self._reasoning is not None else ()
        return found if tools is None else [*self._through_tools(tools, found), *tools.finish()]

    def _through_tools(self, tools: OutputParser, deltas: Sequence[ParsedDelta]) -> Sequence[ParsedDelta]:
        found: list[ParsedDelta] = []
        for delta in deltas:
            if isinstance(delta, TextDelta) and not delta.reasoning:
                found.extend(tools.feed(delta.text))
            else:
                found.append(delta)
        return found


def load_family(name: str) -> ParserFamily:
    """Return a parser family by name.

    Raises:
        ConfigurationError: with the installed names, if there is none of this name or it is no family.
    """
    family = plugins.load("parsers", name)
    if not isinstance(family, ParserFamily):
        raise ConfigurationError(
            f"parsers {name!r} is no dynamo_core.parsing.ParserFamily but {type(family).__name__}; "
            "repair its distribution"
        )
    return family


def load_tool_parser(name: str) -> ParserFactory:
    """Return the tool-call parser of a family.

    Raises:
        ConfigurationError: with the names to choose from, if there is none.
    """
    return load_family(name).tool_calls or _refuse(name, "tool-call", lambda family: family.tool_calls)


def load_reasoning_parser(name: str) -> ParserFactory:
    """Return the reasoning parser of a family.

    Raises:
        ConfigurationError: with the names to choose from, if there is none.
    """
    return load_family(name).reasoning or _refuse(name, "reasoning", lambda family: family.reasoning)


def check_parsers(*, tools: str, reasoning: str) -> None:
    """Check names that an operator gave, so that a wrong one stops the start and not the first model.

    Raises:
        ConfigurationError: with the names to choose from, if a name that is not empty is none of them.
    """
    if tools not in ("", NO_PARSER):
        load_tool_parser(tools)
    if reasoning not in ("", NO_PARSER):
        load_reasoning_parser(reasoning)


def _refuse(name: str, kind: str, part: Callable[[ParserFamily], ParserFactory | None]) -> ParserFactory:
    names: list[str] = []
    for other in sorted(plugins.available("parsers")):
        try:
            if part(load_family(other)) is not None:
                names.append(other)
        except ConfigurationError:
            # A broken plug-in is no choice; whoever chooses it by name hears why.
            continue
    raise ConfigurationError(f"parsers {name!r} has no {kind} parser; choose one of {', '.join(names)}")


def prompt_leaves_reasoning_open(family: ParserFamily, prompt: str) -> bool | None:
    """Return whether a prompt ends inside the reasoning (True) or right behind it (False); None if neither."""
    open_tag, close_tag = family.reasoning_tags
    end = prompt[-_TAIL_CHARS:].rstrip()
    if open_tag and end.endswith(open_tag):
        return True
    return False if close_tag and end.endswith(close_tag) else None
