"""Parsers: every sample gives the same deltas whole and split at every place, and withholds no more than a marker."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamo_core.errors import ConfigurationError
from dynamo_frontend._parsers.chain import ParserChain, load_parser
from dynamo_frontend._parsers.contract import TextDelta, ToolCallDelta
from dynamo_frontend._parsers.hermes import HermesToolParser
from dynamo_frontend._parsers.reasoning import TaggedReasoning, forced_reasoning

CALL = '<tool_call>\n{"name": "f", "arguments": {"a": "é"}}\n</tool_call>'
F = ToolCallDelta("f", '{"a": "é"}')


def merged(deltas):
    found = []
    for delta in deltas:
        last = found[-1] if found else None
        if isinstance(delta, TextDelta) and isinstance(last, TextDelta) and last.reasoning == delta.reasoning:
            found[-1] = TextDelta(last.text + delta.text, delta.reasoning)
        else:
            found.append(delta)
    return found


def parse(make, pieces):
    parser = make()
    deltas = [delta for piece in pieces for delta in parser.feed(piece)]
    return merged([*deltas, *parser.finish()])


def chain():
    return ParserChain(TaggedReasoning(), HermesToolParser())


SAMPLES = [
    (HermesToolParser, "plain text ", [TextDelta("plain text ")]),
    (HermesToolParser, CALL, [F]),
    (HermesToolParser, f"Hi.\n{CALL}\n{CALL}\n", [TextDelta("Hi."), F, F]),
    (HermesToolParser, f"{CALL} after", [F, TextDelta(" after")]),
    (HermesToolParser, "<tool_call>no json</tool_call>", [TextDelta("<tool_call>no json</tool_call>")]),
    (HermesToolParser, '<tool_call>{"name": "f"', [TextDelta('<tool_call>{"name": "f"')]),
    (HermesToolParser, '<tool_call>{"name": "f", "arguments": {"a": "é"}}', [F]),
    (HermesToolParser, "a < b <tool", [TextDelta("a < b <tool")]),
    (HermesToolParser, '<tool_call>{"name": "g", "arguments": "{}"}</tool_call>', [ToolCallDelta("g", "{}")]),
    (HermesToolParser, '<tool_call>["f"]</tool_call>', [TextDelta('<tool_call>["f"]</tool_call>')]),
    (TaggedReasoning, "no thought", [TextDelta("no thought")]),
    (TaggedReasoning, "<think>\nwhy\n</think>\n\nso", [TextDelta("why\n", reasoning=True), TextDelta("so")]),
    (TaggedReasoning, "<think>cut off", [TextDelta("cut off", reasoning=True)]),
    (TaggedReasoning, "1 < 2 <thi", [TextDelta("1 < 2 <thi")]),
    (forced_reasoning, "why</think>so", [TextDelta("why", reasoning=True), TextDelta("so")]),
    (chain, f"<think>{CALL}</think>{CALL}", [TextDelta(CALL, reasoning=True), F]),
    (chain, f"<think>x</think>Hi {CALL}", [TextDelta("x", reasoning=True), TextDelta("Hi"), F]),
]


@pytest.mark.parametrize(("make", "text", "expected"), SAMPLES)
def test_samples_whole_and_split_everywhere(make, text, expected):
    assert parse(make, [text]) == expected
    assert parse(make, list(text)) == expected
    for place in range(len(text)):
        assert parse(make, [text[:place], text[place:]]) == expected, place


@given(
    text=st.lists(st.sampled_from(["<think>", "</think>", "<tool_call>", "</tool_call>", "{}", CALL, "a", " ", "<"])),
    sizes=st.lists(st.integers(1, 9)),
)
def test_any_text_any_cut(text, sizes):
    text = "".join(text)
    pieces, start = [], 0
    for size in sizes:
        pieces.append(text[start : start + size])
        start += size
    assert parse(chain, [*pieces, text[start:]]) == parse(chain, [text])


def test_text_is_withheld_only_while_it_may_be_a_marker():
    parser = chain()
    shown = ""
    for char in "if a <= b then <thing> or <tool> end":
        shown += "".join(delta.text for delta in parser.feed(char))
    assert shown.endswith("end")


def test_parsers_are_found_by_name():
    assert load_parser("hermes") is HermesToolParser
    assert load_parser("basic") is TaggedReasoning
    with pytest.raises(ConfigurationError, match="hermes"):
        load_parser("nonesuch")
