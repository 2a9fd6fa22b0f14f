"""Conformance of output parsers."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Iterable, Sequence

from dynamo_core.parsing import (
    ArgumentsDelta,
    CallEnd,
    CallStart,
    OutputParser,
    ParsedDelta,
    ParserContext,
    TextDelta,
)
from dynamo_core.testing._suite import ConformanceSuite


class OutputParserConformance(ConformanceSuite, suite=True):
    """Every ``OutputParser`` must pass this, with samples of its family's output."""

    @abstractmethod
    def make_parser(self, context: ParserContext) -> OutputParser:
        """Return a new parser."""
        ...

    @abstractmethod
    def samples(self) -> Sequence[str]:
        """Return outputs: calls and reasoning of every form, text around them, and what the model got wrong."""
        ...

    def context(self) -> ParserContext:
        """Return what the parser may know of the request of the samples."""
        return ParserContext()

    def parsed(self, pieces: Iterable[str]) -> list[ParsedDelta]:
        """Return what comes of a text in pieces, neighbouring deltas of one kind joined."""
        parser = self.make_parser(self.context())
        deltas = [delta for piece in pieces for delta in parser.feed(piece)]
        return _joined([*deltas, *parser.finish()])

    def test_result_does_not_depend_on_where_the_text_is_cut(self) -> None:
        for text in self.samples():
            whole = self.parsed([text])
            assert self.parsed(text) == whole, f"{text!r} character by character"
            for place in range(1, len(text)):
                assert self.parsed([text[:place], text[place:]]) == whole, f"{text!r} cut at {place}"

    def test_output_may_end_anywhere(self) -> None:
        for text in self.samples():
            for place in range(len(text)):
                _check_order(self.parsed([text[:place]]))

    def test_arguments_of_a_call_are_json_exactly_if_it_is_complete(self) -> None:
        for text in self.samples():
            for place in range(len(text) + 1):
                for arguments, complete in _calls(self.parsed([text[:place]])):
                    assert _is_json(arguments) == complete, f"{text[:place]!r} gives {arguments!r}"

    def test_text_and_arguments_are_never_empty(self) -> None:
        for text in self.samples():
            parser = self.make_parser(self.context())
            deltas = [delta for char in text for delta in parser.feed(char)]
            for delta in [*deltas, *parser.finish()]:
                assert not isinstance(delta, TextDelta | ArgumentsDelta) or delta.text

    def test_nothing_comes_of_nothing(self) -> None:
        assert self.parsed([]) == []
        assert self.parsed(["", ""]) == []

    def test_parsers_share_nothing(self) -> None:
        for text in self.samples():
            alone = self.parsed([text])
            other = self.make_parser(self.context())
            other.feed(text[: len(text) // 2])
            assert self.parsed([text]) == alone


def _joined(deltas: Iterable[ParsedDelta]) -> list[ParsedDelta]:
    found: list[ParsedDelta] = []
    for delta in deltas:
        last = found[-1] if found else None
        if isinstance(delta, TextDelta) and isinstance(last, TextDelta) and last.reasoning == delta.reasoning:
            found[-1] = TextDelta(last.text + delta.text, delta.reasoning)
        elif isinstance(delta, ArgumentsDelta) and isinstance(last, ArgumentsDelta):
            found[-1] = ArgumentsDelta(last.text + delta.text)
        else:
            found.append(delta)
    return found


def _check_order(deltas: Iterable[ParsedDelta]) -> None:
    """Calls begin, have arguments and end, one after the other."""
    open_call = False
    for delta in deltas:
        assert open_call == isinstance(delta, ArgumentsDelta | CallEnd), f"{delta!r} is out of order"
        open_call = isinstance(delta, CallStart | ArgumentsDelta)
    assert not open_call, "the last call has no end"


def _calls(deltas: Iterable[ParsedDelta]) -> list[tuple[str, bool]]:
    """Return arguments and completeness of every call."""
    found: list[tuple[str, bool]] = []
    arguments = ""
    for delta in deltas:
        if isinstance(delta, CallStart):
            arguments = ""
        elif isinstance(delta, ArgumentsDelta):
            arguments += delta.text
        elif isinstance(delta, CallEnd):
            found.append((arguments, delta.complete))
    return found


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True
