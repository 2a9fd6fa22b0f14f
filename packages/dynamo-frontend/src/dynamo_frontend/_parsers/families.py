"""The parsers by family: each is an entry of the plug-in group ``dynamo_core.parsers``."""

from __future__ import annotations

import functools

from dynamo_frontend._parsers import bodies
from dynamo_frontend._parsers.contract import OutputParser, ParserFactory, Tools
from dynamo_frontend._parsers.reasoning import TaggedReasoning
from dynamo_frontend._parsers.tagged import BodyReader, TaggedToolParser, WholeTextToolParser


def _tagged(opening: str, closing: str, read: BodyReader, *, special: bool = False) -> ParserFactory:
    def create(tools: Tools) -> OutputParser:
        return TaggedToolParser(opening, closing, read, tools, special=special)

    return create


def _whole(begins: tuple[str, ...], read: BodyReader) -> ParserFactory:
    def create(tools: Tools) -> OutputParser:
        return WholeTextToolParser(begins, read, tools)

    return create


def _reasoning(open_tag: str, close_tag: str, *, starts_inside: bool = False) -> ParserFactory:
    make = functools.partial(TaggedReasoning, open_tag, close_tag, starts_inside=starts_inside)

    def create(tools: Tools) -> OutputParser:
        return make()

    return create


hermes = _tagged("<tool_call>", "</tool_call>", bodies.read_json)
qwen3_coder = _tagged("<tool_call>", "</tool_call>", bodies.read_xml_functions)
glm47 = _tagged("<tool_call>", "</tool_call>", bodies.read_glm)
nemotron_deci = _tagged("<TOOLCALL>", "</TOOLCALL>", bodies.read_json)
jamba = _tagged("<tool_calls>", "</tool_calls>", bodies.read_json)
minimax_m2 = _tagged("<minimax:tool_call>", "</minimax:tool_call>", bodies.read_invokes)
mistral = _tagged("[TOOL_CALLS]", "", bodies.read_mistral, special=True)
phi4 = _tagged("functools", "", bodies.read_json)
deepseek_v3 = _tagged(
    "<\uff5ctool\u2581calls\u2581begin\uff5c>",
    "<\uff5ctool\u2581calls\u2581end\uff5c>",
    bodies.read_deepseek,
    special=True,
)
kimi_k2 = _tagged("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>", bodies.read_kimi, special=True)
llama3_json = _whole(("{", "<|python_tag|>{"), bodies.read_json_lines)
pythonic = _whole(("[",), bodies.read_pythonic)
default = _whole(("{", "["), bodies.read_json)

basic = _reasoning("<think>", "</think>")
deepseek_r1 = _reasoning("<think>", "</think>", starts_inside=True)
granite = _reasoning("Here is my thought process:", "Here is my response:")
kimi = _reasoning("◁think▷", "◁/think▷")
mistral_reasoning = _reasoning("[THINK]", "[/THINK]")
