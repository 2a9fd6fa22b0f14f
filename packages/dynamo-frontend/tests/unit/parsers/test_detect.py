"""Parsers that a model's template and vocabulary show."""

import pytest

from dynamo_frontend._parsers.chain import load_reasoning_parser, load_tool_parser
from dynamo_frontend._parsers.detect import detect_reasoning_parser, detect_tool_parser

SECTION = "<\uff5ctool\u2581calls\u2581begin\uff5c>"
DSML = "\uff5cDSML\uff5c"


@pytest.mark.parametrize(
    ("template", "name"),
    [
        ("<tool_call>{{ c | tojson }}</tool_call>", "hermes"),
        ("<tool_call>\n<function=", "qwen3_coder"),
        ("<tool_call>x<arg_key>", "glm47"),
        ("[TOOL_CALLS]", "mistral"),
        ("]<]minimax[>[<tool_call>", "minimax_m3"),
        ("<minimax:tool_call>", "minimax_m2"),
        (SECTION + "function\n```json", "deepseek_v3"),
        (SECTION + "function", "deepseek_v3_1"),
        (f"<{DSML}function_calls>", "deepseek_v3_2"),
        (f"<{DSML}tool_calls>", "deepseek_v4"),
        ("<|tool_call>call:{}<tool_call|>", "gemma4"),
        ("<|channel|>commentary to=functions.x<|message|>", "harmony"),
        ("<TOOLCALL>", "nemotron_deci"),
        ("<|python_tag|>", "llama3_json"),
    ],
)
def test_tool_parser_shows_in_the_template(template, name):
    assert detect_tool_parser(template) == name
    assert load_tool_parser(name)


def test_a_plain_template_shows_no_tool_parser():
    assert detect_tool_parser("plain") == ""


@pytest.mark.parametrize(
    ("template", "tokens", "name"),
    [
        ("", {"<think>", "</think>"}, "basic"),
        ("{{ '<|assistant|><think>\\n' }}", {"<think>", "</think>"}, "deepseek_r1"),
        ("", {"\u25c1think\u25b7", "\u25c1/think\u25b7"}, "kimi"),
        ("", {"<mm:think>", "</mm:think>"}, "minimax_m3"),
        ("", {"<|channel>", "<channel|>"}, "gemma4"),
        ("", {"<|channel|>", "<|message|>"}, "gpt_oss"),
    ],
)
def test_reasoning_parser_shows_in_the_vocabulary(template, tokens, name):
    assert detect_reasoning_parser(template, tokens) == name
    assert load_reasoning_parser(name)


def test_half_a_pair_of_tags_shows_nothing():
    assert detect_reasoning_parser("", {"<think>"}) == ""
