"""Output that is constrained to calls."""

import pytest

from dynamo_core.parsing import TextDelta
from dynamo_frontend._parsers.contract import ToolCallDelta
from dynamo_frontend._parsers.forced import forced_call, forced_calls


def parse(parser, pieces):
    found = [delta for piece in pieces for delta in parser.feed(piece)] + list(parser.finish())
    text = "".join(delta.text for delta in found if isinstance(delta, TextDelta))
    return [delta for delta in found if isinstance(delta, ToolCallDelta)], text


@pytest.mark.parametrize(
    ("output", "calls", "text"),
    [
        ('[{"name": "f", "arguments": {"a": 1}}]', [ToolCallDelta("f", '{"a": 1}')], ""),
        (
            ' [{"name": "f", "arguments": {}},\n {"name": "g"}]',
            [ToolCallDelta("f", "{}"), ToolCallDelta("g", "{}")],
            "",
        ),
        ('{"name": "f", "arguments": {}}', [ToolCallDelta("f", "{}")], ""),
        ('[{"name": "f", "arguments": {"a": "b', [ToolCallDelta("f", '{"a": "b')], ""),
        ('[{"name": "f", "arguments": {"a" <b>}}]', [ToolCallDelta("f", '{"a" <b>}}]')], ""),
        ("[1]", [], "[1]"),
        ("no JSON", [], "no JSON"),
        ("", [], ""),
    ],
)
def test_an_array_of_calls(output, calls, text):
    assert parse(forced_calls(), [output]) == (calls, text)
    assert parse(forced_calls(), output) == (calls, text)


@pytest.mark.parametrize(
    ("output", "calls", "text"),
    [
        ('{"a": "{b]"}', [ToolCallDelta("f", '{"a": "{b]"}')], ""),
        (' {"a": 1}\n', [ToolCallDelta("f", '{"a": 1}')], ""),
        ('{"a": "cut', [ToolCallDelta("f", '{"a": "cut')], ""),
        ('{"a" <b>}', [ToolCallDelta("f", '{"a" <b>}')], ""),
        ("no JSON", [], "no JSON"),
    ],
)
def test_the_arguments_of_one_function(output, calls, text):
    assert parse(forced_call("f"), [output]) == (calls, text)
    assert parse(forced_call("f"), output) == (calls, text)


def test_no_special_tokens_are_needed():
    assert not forced_calls().needs_special_tokens
    assert not forced_call("f").needs_special_tokens
