"""Chains of parsers, and families by name."""

import re
import sys
from importlib.metadata import EntryPoint
from types import ModuleType
from typing import NamedTuple

import pytest

from dynamo_core import plugins
from dynamo_core.errors import ConfigurationError
from dynamo_core.parsing import ArgumentsDelta, CallEnd, CallStart, ParserContext, ParserFamily, TextDelta
from dynamo_frontend._parsers import families
from dynamo_frontend._parsers.chain import (
    ParserChain,
    check_parsers,
    load_family,
    load_reasoning_parser,
    load_tool_parser,
    prompt_leaves_reasoning_open,
)
from dynamo_frontend._parsers.machine import GrammarParser

CALL = '<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>'


class Call(NamedTuple):
    name: str
    arguments: str


F = Call("f", '{"a": 1}')
TOOL_NAMES = """deepseek_v3 deepseek_v3_1 deepseek_v3_2 deepseek_v4 default gemma4 glm47 harmony hermes jamba kimi_k2
    llama3_json minimax_m2 minimax_m3 mistral nemotron_deci nemotron_nano phi4 pythonic qwen3_coder"""
REASONING_NAMES = """basic deepseek_r1 deepseek_v4 gemma4 glm45 gpt_oss granite kimi kimi_k25 minimax_append_think
    minimax_m2 minimax_m3 mistral nemotron3 nemotron_deci nemotron_nano nemotron_v3 qwen3 step3"""


def parser_of(factory):
    return factory(ParserContext())


def parse(chain, *pieces):
    return joined([delta for piece in pieces for delta in chain.feed(piece)] + list(chain.finish()))


def joined(deltas):
    """Deltas with each call as one."""
    found, name, arguments = [], "", ""
    for delta in deltas:
        match delta:
            case CallStart():
                name, arguments = delta.name, ""
            case ArgumentsDelta():
                arguments += delta.text
            case CallEnd():
                found.append(Call(name, arguments))
            case _:
                found.append(delta)
    return found


def test_calls_are_not_looked_for_in_reasoning():
    chain = ParserChain(parser_of(load_reasoning_parser("basic")), parser_of(load_tool_parser("hermes")))
    assert parse(chain, f"<think>{CALL}</think>Hi {CALL}") == [TextDelta(CALL, reasoning=True), TextDelta("Hi"), F]


def test_reasoning_alone_and_nothing_at_all():
    assert parse(ParserChain(parser_of(load_reasoning_parser("basic")), None), "<think>a</think>", CALL) == [
        TextDelta("a", reasoning=True),
        TextDelta(CALL),
    ]
    assert parse(ParserChain(None, None), CALL) == [TextDelta(CALL)]


def test_a_call_ends_with_its_arguments():
    chain = ParserChain(None, parser_of(load_tool_parser("hermes")))
    first = list(chain.feed(CALL[: CALL.index("}}")]))
    assert first[0] == CallStart("f")
    last = list(chain.feed("}"))
    assert last == [ArgumentsDelta("}"), CallEnd()]
    assert "".join(delta.text for delta in [*first[1:], last[0]]) == F.arguments
    assert parse(chain, "}</tool_call>") == []


def test_a_streamed_call_begins_before_its_arguments():
    chain = ParserChain(None, parser_of(load_tool_parser("hermes")))
    assert list(chain.feed('<tool_call>{"name": "f", "arguments": ')) == []
    assert next(iter(chain.feed("{"))) == CallStart("f")


def test_channels_reach_the_call_parser_behind_the_reasoning_parser():
    chain = ParserChain(parser_of(load_reasoning_parser("gpt_oss")), parser_of(load_tool_parser("harmony")))
    text = (
        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>commentary to=functions.f "
        '<|constrain|>json<|message|>{"a": 1}<|call|><|start|>assistant<|channel|>final<|message|>So.'
    )
    expected = [TextDelta("Hm.", reasoning=True), F, TextDelta("So.")]
    assert parse(chain, text) == expected
    for place in range(len(text)):
        chain = ParserChain(parser_of(load_reasoning_parser("gpt_oss")), parser_of(load_tool_parser("harmony")))
        deltas = parse(chain, text[:place], text[place:])
        assert [d for d in deltas if isinstance(d, Call)] == [F]
        assert "".join(d.text for d in deltas if isinstance(d, TextDelta)) == "Hm.So."


def test_kimi_calls_end_open_reasoning():
    chain = ParserChain(parser_of(load_reasoning_parser("kimi_k25")), parser_of(load_tool_parser("kimi_k2")))
    call = "<|tool_calls_section_begin|><|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>"
    deltas = parse(chain, f'why{call}{{"a": 1}}<|tool_call_end|><|tool_calls_section_end|>')
    assert deltas == [TextDelta("why", reasoning=True), F]


@pytest.mark.parametrize("name", TOOL_NAMES.split())
def test_every_tool_family_is_installed(name):
    assert isinstance(parser_of(load_tool_parser(name)), GrammarParser)


@pytest.mark.parametrize("name", REASONING_NAMES.split())
def test_every_reasoning_family_is_installed(name):
    parser = parser_of(load_reasoning_parser(name))
    assert "".join(delta.text for delta in [*parser.feed("pla"), *parser.feed("in"), *parser.finish()]) == "plain"


def test_every_family_in_the_module_is_an_entry():
    entries = [plugins.load("parsers", name) for name in plugins.available("parsers")]
    for value in vars(families).values():
        assert not isinstance(value, ParserFamily) or value in entries


def test_unknown_names_are_refused_with_the_names_there_are():
    with pytest.raises(ConfigurationError, match=r"'nonesuch' \(installed: .*hermes"):
        load_tool_parser("nonesuch")
    with pytest.raises(ConfigurationError) as caught:
        load_tool_parser("basic")
    assert re.search(
        r"'basic' has no tool-call parser; choose one of deepseek_v3, .*qwen3_coder$", caught.value.message
    )
    with pytest.raises(ConfigurationError, match="'hermes' has no reasoning parser; choose one of basic, "):
        load_reasoning_parser("hermes")


def test_names_of_an_operator_are_checked():
    check_parsers(tools="", reasoning="")
    check_parsers(tools="hermes", reasoning="qwen3")
    with pytest.raises(ConfigurationError, match="hermess"):
        check_parsers(tools="hermess", reasoning="")
    with pytest.raises(ConfigurationError, match="reasoning parser"):
        check_parsers(tools="", reasoning="hermes")


@pytest.fixture
def entries(monkeypatch):
    found = []
    monkeypatch.setattr(plugins, "_entry_points", lambda group: tuple(found))
    return found


class ShoutParser:
    """A parser as another distribution would write it: every line in capitals is a call."""

    def __init__(self, context):
        self._held = ""

    def feed(self, text):
        *lines, self._held = (self._held + text).split("\n")
        return [delta for line in lines for delta in self._line(line + "\n")]

    def finish(self):
        return self._line(self._held) if self._held else []

    def _line(self, line):
        if line.isupper():
            return [CallStart(line.strip()), ArgumentsDelta("{}"), CallEnd()]
        return [TextDelta(line)]


def test_a_parser_of_another_distribution(entries, monkeypatch):
    module = ModuleType("shouting")
    module.FAMILY = ParserFamily(tool_calls=ShoutParser)
    monkeypatch.setitem(sys.modules, "shouting", module)
    entries.append(EntryPoint("shout", "shouting:FAMILY", "dynamo_core.parsers"))
    chain = ParserChain(None, parser_of(load_tool_parser("shout")))
    assert parse(chain, "hello\nHE", "LP\nbye") == [TextDelta("hello\n"), Call("HELP", "{}"), TextDelta("bye")]


def test_an_entry_that_is_no_family_is_refused(entries):
    entries.append(EntryPoint("odd", "dynamo_frontend._parsers.machine:Cursor", "dynamo_core.parsers"))
    entries.append(EntryPoint("basic", "dynamo_frontend._parsers.families:BASIC", "dynamo_core.parsers"))
    with pytest.raises(ConfigurationError, match=r"'odd' is no dynamo_core\.parsing\.ParserFamily but type"):
        load_tool_parser("odd")
    with pytest.raises(ConfigurationError, match="'basic' has no tool-call parser"):
        load_tool_parser("basic")


@pytest.mark.parametrize(
    ("name", "prompt", "expected"),
    [
        ("qwen3", "<|im_start|>assistant\n<think>\n", True),
        ("qwen3", "<|im_start|>assistant\n<think>\n\n</think>\n\n", False),
        ("qwen3", "<|im_start|>assistant\n", None),
        ("minimax_m3", "<mm:think>", True),
        ("hermes", "<think>", None),
        ("granite", "Here is my thought process:", None),
    ],
)
def test_what_a_prompt_says_of_the_reasoning(name, prompt, expected):
    assert prompt_leaves_reasoning_open(load_family(name), prompt) is expected


async def test_frontend_does_not_start_with_an_unknown_parser(stack):
    with pytest.raises(ConfigurationError, match="no parsers plug-in is named 'nonesuch'"):
        await stack.start(workers=0, tool_call_parser="nonesuch")
