"""The suite of output parsers holds a right parser, and catches wrong ones."""

from collections.abc import Sequence

import pytest

from dynamo_core.parsing import ArgumentsDelta, CallEnd, CallStart, OutputParser, ParsedDelta, ParserContext, TextDelta
from dynamo_core.testing import OutputParserConformance

SAMPLES = ("plain", "a !f{} b", "!f{", "!", "!f{}!g{}", "")


class BangParser:
    """Calls are ``!NAME{}``: a name of one letter and no arguments."""

    def __init__(self, context: ParserContext) -> None:
        self.held = ""

    def feed(self, text: str) -> Sequence[ParsedDelta]:
        found: list[ParsedDelta] = []
        for char in text:
            self.held += char
            if self.held[0] != "!":
                found.append(TextDelta(self.held))
            elif len(self.held) == 2:
                found.append(CallStart(char))
                continue
            elif len(self.held) > 2:
                found.append(ArgumentsDelta(char))
                if char == "}":
                    found.append(CallEnd())
            if self.held[0] != "!" or char == "}":
                self.held = ""
        return found

    def finish(self) -> Sequence[ParsedDelta]:
        return [CallEnd(complete=False)] if len(self.held) > 1 else []


class TestBangParser(OutputParserConformance):
    def make_parser(self, context: ParserContext) -> OutputParser:
        return BangParser(context)

    def samples(self) -> Sequence[str]:
        return SAMPLES


class Eager(BangParser):
    """Looks for calls in each piece alone."""

    def feed(self, text: str) -> Sequence[ParsedDelta]:
        return super().feed(text) if "!f{}" in text else [TextDelta(text)] if text else []


class Careless(BangParser):
    """Says of every call that it is complete."""

    def finish(self) -> Sequence[ParsedDelta]:
        return [CallEnd()] if super().finish() else []


class Endless(BangParser):
    """Ends no call that the output cut off."""

    def finish(self) -> Sequence[ParsedDelta]:
        return []


class Chatty(BangParser):
    """Gives empty text."""

    def feed(self, text: str) -> Sequence[ParsedDelta]:
        return [*super().feed(text), TextDelta("")]


@pytest.mark.parametrize(
    ("parser", "test"),
    [
        (Eager, "test_result_does_not_depend_on_where_the_text_is_cut"),
        (Careless, "test_arguments_of_a_call_are_json_exactly_if_it_is_complete"),
        (Endless, "test_output_may_end_anywhere"),
        (Chatty, "test_text_and_arguments_are_never_empty"),
        (Chatty, "test_nothing_comes_of_nothing"),
    ],
)
def test_suite_catches(parser: type[BangParser], test: str) -> None:
    class Wrong(TestBangParser):
        def make_parser(self, context: ParserContext) -> OutputParser:
            return parser(context)

    with pytest.raises(AssertionError):
        getattr(Wrong(), test)()
