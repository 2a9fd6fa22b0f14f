"""Output that is constrained to calls."""

from typing import NamedTuple

import pytest

from dynamo_core.parsing import ArgumentsDelta, CallStart, TextDelta
from dynamo_frontend._parsers.forced import forced_call, forced_calls


class Call(NamedTuple):
    name: str
    arguments: str


def parse(parser, pieces):
    found = [delta for piece in pieces for delta in parser.feed(piece)] + list(parser.finish())
    text = "".join(delta.text for delta in found if isinstance(delta, TextDelta))
    calls = []
    for delta in found:
        if isinstance(delta, CallStart):
            calls.append(Call(delta.name, ""))
        elif isinstance(delta, ArgumentsDelta):
            calls[-1] = Call(calls[-1].name, calls[-1].arguments + delta.text)
    return calls, text


@pytest.mark.parametrize(
    ("output", "calls", "text"),
    [
        ('[{"name": "f", "arguments": {"a": 1}}]', [Call("f", '{"a": 1}')], ""),
        (
            ' [{"name": "f", "arguments": {}},\n {"name": "g"}]',
            [Call("f", "{}"), Call("g", "{}")],
            "",
        ),
        ('{"name": "f", "arguments": {}}', [Call("f", "{}")], ""),
        ('[{"name": "f", "arguments": {"a": "b', [Call("f", '{"a": "b')], ""),
        ('[{"name": "f", "arguments": {"a" <b>}}]', [Call("f", '{"a" <b>}}]')], ""),
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
        ('{"a": "{b]"}', [Call("f", '{"a": "{b]"}')], ""),
        (' {"a": 1}\n', [Call("f", '{"a": 1}')], ""),
        ('{"a": "cut', [Call("f", '{"a": "cut')], ""),
        ('{"a" <b>}', [Call("f", '{"a" <b>}')], ""),
        ("no JSON", [], "no JSON"),
    ],
)
def test_the_arguments_of_one_function(output, calls, text):
    assert parse(forced_call("f"), [output]) == (calls, text)
    assert parse(forced_call("f"), output) == (calls, text)


def test_no_special_tokens_are_needed():
    assert not forced_calls().needs_special_tokens
    assert not forced_call("f").needs_special_tokens
