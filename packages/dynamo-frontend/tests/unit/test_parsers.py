"""Parsers: every sample gives the same deltas whole and split at every place, and withholds no more than a marker."""

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamo_core import plugins
from dynamo_core.errors import ConfigurationError
from dynamo_frontend._parsers import families
from dynamo_frontend._parsers.chain import ParserChain, load_parser
from dynamo_frontend._parsers.contract import TextDelta, ToolCallDelta
from dynamo_frontend._parsers.detect import detect_reasoning_parser, detect_tool_parser

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


TOOLS = [
    {
        "type": "function",
        "function": {"name": "f", "parameters": {"properties": {"s": {"type": "string"}, "n": {"type": "integer"}}}},
    }
]


def chain():
    return ParserChain(families.basic(()), families.hermes(TOOLS))


def of(name):
    return lambda: getattr(families, name)(TOOLS)


def call(name="f", **arguments):
    return ToolCallDelta(name, json.dumps(arguments, ensure_ascii=False))


def text(value):
    return TextDelta(value)


def deepseek(body):
    """The family writes its markers with a full-width bar and a low block."""
    sample = f"<|tool_calls_begin|><|tool_call_begin|>{body}<|tool_call_end|><|tool_calls_end|>"
    return re.sub(r"<[^>]*>", lambda mark: mark[0].replace("|", "\uff5c").replace("_", "\u2581"), sample)


def thought(value):
    return TextDelta(value, reasoning=True)


SAMPLES = [
    (of("hermes"), "plain text ", [text("plain text ")]),
    (of("hermes"), CALL, [F]),
    (of("hermes"), f"Hi.\n{CALL}\n{CALL}\n", [text("Hi."), F, F]),
    (of("hermes"), f"{CALL} after", [F, text(" after")]),
    (of("hermes"), "<tool_call>no json</tool_call>", [text("<tool_call>no json</tool_call>")]),
    (of("hermes"), '<tool_call>{"name": "f"', [text('<tool_call>{"name": "f"')]),
    (of("hermes"), '<tool_call>{"name": "f", "arguments": {"a": "é"}}', [F]),
    (of("hermes"), "a < b <tool", [text("a < b <tool")]),
    (of("hermes"), '<tool_call>{"name": "g", "arguments": "{}"}</tool_call>', [ToolCallDelta("g", "{}")]),
    (of("hermes"), '<tool_call>["f"]</tool_call>', [text('<tool_call>["f"]</tool_call>')]),
    (
        of("qwen3_coder"),
        "Ok\n<tool_call>\n<function=f>\n<parameter=s>\n12\n</parameter>\n<parameter=n>\n12\n</parameter>\n"
        "</function>\n</tool_call>",
        [text("Ok"), call(s="12", n=12)],
    ),
    (
        of("glm47"),
        "<tool_call>f\n<arg_key>s</arg_key>\n<arg_value>1</arg_value>\n<arg_key>n</arg_key>\n<arg_value>1</arg_value>\n"
        "</tool_call>",
        [call(s="1", n=1)],
    ),
    (of("nemotron_deci"), '<TOOLCALL>[{"name": "f", "arguments": {"n": 1}}]</TOOLCALL>', [call(n=1)]),
    (of("jamba"), '<tool_calls>[\n{"name": "f", "arguments": {}}, {"name": "g"}\n]</tool_calls>', [call(), call("g")]),
    (
        of("minimax_m2"),
        '<minimax:tool_call>\n<invoke name="f">\n<parameter name="s">2</parameter>\n</invoke>\n</minimax:tool_call>',
        [call(s="2")],
    ),
    (of("mistral"), 'Hm.[TOOL_CALLS] [{"name": "f", "arguments": {"n": 1}}]', [text("Hm."), call(n=1)]),
    (of("mistral"), '[TOOL_CALLS]f{"n": 1}[TOOL_CALLS]g[ARGS]{}', [call(n=1), ToolCallDelta("g", "{}")]),
    (of("mistral"), "[TOOL_CALLS] oops", [text("[TOOL_CALLS] oops")]),
    (of("phi4"), 'functools[{"name": "f", "arguments": {"n": 1}}]', [call(n=1)]),
    (
        of("deepseek_v3"),
        deepseek('function<|tool_sep|>f\n```json\n{"n": 1}\n```'),
        [call(n=1)],
    ),
    (
        of("deepseek_v3"),
        "So:" + deepseek('f<|tool_sep|>{"n": 1}'),
        [text("So:"), call(n=1)],
    ),
    (
        of("kimi_k2"),
        '<|tool_calls_section_begin|><|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>{"n": 1}'
        "<|tool_call_end|><|tool_calls_section_end|>",
        [call(n=1)],
    ),
    (of("llama3_json"), '{"name": "f", "parameters": {"n": 1}}', [call(n=1)]),
    (of("llama3_json"), '{"name": "f", "parameters": {}}; {"name": "g"}', [call(), call("g")]),
    (of("llama3_json"), "Just {text}", [text("Just {text}")]),
    (of("llama3_json"), '{"no": "call"}', [text('{"no": "call"}')]),
    (of("pythonic"), "[f(n=1, s='é'), g()]", [call(n=1, s="é"), call("g")]),
    (of("pythonic"), "[f(1)]", [text("[f(1)]")]),
    (of("pythonic"), "[f(n=open('x'))]", [text("[f(n=open('x'))]")]),
    (of("default"), '[{"name": "f", "arguments": {"n": 1}}]', [call(n=1)]),
    (of("basic"), "no thought", [text("no thought")]),
    (of("basic"), "<think>\nwhy\n</think>\n\nso", [thought("why\n"), text("so")]),
    (of("basic"), "<think>cut off", [thought("cut off")]),
    (of("basic"), "1 < 2 <thi", [text("1 < 2 <thi")]),
    (of("deepseek_r1"), "why</think>so", [thought("why"), text("so")]),
    (of("granite"), "Here is my thought process: a Here is my response: b", [thought(" a "), text(" b")]),
    (of("kimi"), "◁think▷a◁/think▷b", [thought("a"), text("b")]),
    (of("mistral_reasoning"), "[THINK]a[/THINK]b", [thought("a"), text("b")]),
    (chain, f"<think>{CALL}</think>{CALL}", [thought(CALL), F]),
    (chain, f"<think>x</think>Hi {CALL}", [thought("x"), text("Hi"), F]),
]


@pytest.mark.parametrize(("make", "sample", "expected"), SAMPLES)
def test_samples_whole_and_split_everywhere(make, sample, expected):
    assert parse(make, [sample]) == expected
    assert parse(make, list(sample)) == expected
    for place in range(len(sample)):
        assert parse(make, [sample[:place], sample[place:]]) == expected, place


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
    assert load_parser("hermes") is families.hermes
    assert load_parser("nemotron_nano") is families.qwen3_coder
    for name in plugins.available("parsers"):
        assert list(load_parser(name)(()).feed("plain words")) in ([text("plain words")], [thought("plain words")])
    with pytest.raises(ConfigurationError, match="hermes"):
        load_parser("nonesuch")


@pytest.mark.parametrize(
    ("template", "name"),
    [
        ("<tool_call>{{ c | tojson }}</tool_call>", "hermes"),
        ("<tool_call>\n<function=", "qwen3_coder"),
        ("<tool_call>x<arg_key>", "glm47"),
        ("[TOOL_CALLS]", "mistral"),
        ("plain", ""),
    ],
)
def test_tool_parser_shows_in_the_template(template, name):
    assert detect_tool_parser(template) == name


def test_reasoning_parser_shows_in_the_vocabulary():
    assert detect_reasoning_parser("", {"<think>", "</think>"}) == "basic"
    assert detect_reasoning_parser("{{ '<|assistant|><think>\\n' }}", {"<think>", "</think>"}) == "deepseek_r1"
    assert detect_reasoning_parser("", {"<think>"}) == ""
