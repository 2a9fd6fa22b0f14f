"""Calls in a section of special tokens: ``deepseek_v3``, ``deepseek_v3_1`` and ``kimi_k2``.

The markers are tokens that nobody types, so they never reach the answer, whatever stands between them.
"""

from __future__ import annotations

import re

from dynamo_core.parsing import ParserContext
from dynamo_frontend._parsers.json_text import json_value
from dynamo_frontend._parsers.machine import MAX_BLANK, Cursor, Markers, Steps

_KIMI_ID = re.compile(r"(?:functions\.)?(?P<name>.+?)(?::\d+)?$", re.DOTALL)


class SectionCalls:
    """Grammar of ``begin HEAD separator JSON end`` within a section.

    Args:
        sections: Markers around the section; they are dropped.
        call: Markers that begin a call, stand before its arguments, and end it.
    """

    def __init__(self, sections: tuple[str, ...], call: tuple[str, str, str]) -> None:
        self.texts = (*sections, *call)
        self._begin, self._separator, self._end = call
        self._markers = Markers(*self.texts)
        self._ends = Markers(self._end, *sections)

    def __call__(self, cursor: Cursor, context: ParserContext) -> Steps[None]:
        """Read the output of one choice."""
        marker = yield from cursor.prose(self._markers)
        while marker:
            if marker == self._begin:
                yield from self._call(cursor)
            marker = yield from cursor.prose(self._markers)

    def _call(self, cursor: Cursor) -> Steps[None]:
        cursor.mark()
        name = yield from self._head(cursor)
        if not name:
            yield from cursor.give_back()
            return
        cursor.release()
        cursor.out.start(name)
        yield from cursor.spaces(MAX_BLANK)
        whole = yield from json_value(cursor, cursor.out.arguments)
        if whole:
            cursor.out.end()
            yield from cursor.until(self._ends, _drop)
            return
        yield from self._without_value(cursor)

    def _without_value(self, cursor: Cursor) -> Steps[None]:
        """Read the rest of a call whose arguments are missing or broken."""
        rest, marker = yield from cursor.collect(self._ends)
        empty = cursor.out.arguments_are_empty and not rest.strip()
        cursor.out.arguments("{}" if empty and marker else rest)
        cursor.out.end()

    def _head(self, cursor: Cursor) -> Steps[str]:
        """Read up to the arguments; return the function's name, or an empty string if there is none."""
        name, end = yield from cursor.name(self._separator)
        return name if end else ""


class KimiCalls(SectionCalls):
    """Kimi's head is an id: ``functions.NAME:INDEX``."""

    def _head(self, cursor: Cursor) -> Steps[str]:
        text = yield from super()._head(cursor)
        found = _KIMI_ID.match(text)
        return found["name"] if found else ""


class DeepseekV3Calls(SectionCalls):
    """The first DeepSeek form: the head is a type, and the name stands on a line before fenced JSON."""

    def _head(self, cursor: Cursor) -> Steps[str]:
        kind = yield from super()._head(cursor)
        if not kind:
            return ""
        name, end = yield from cursor.name("\n")
        yield from cursor.spaces(MAX_BLANK)
        yield from cursor.accept("```json")
        return name if end else ""


def _drop(text: str) -> None:
    """Forget what stands between a call's arguments and its end: a fence or white space."""
    del text


def _deepseek(words: str) -> str:
    """Return DeepSeek's token of some words: between full-width bars, its own sign for a space."""
    return f"<\uff5c{words.replace(' ', chr(0x2581))}\uff5c>"


_DEEPSEEK_SECTION = (_deepseek("tool calls begin"), _deepseek("tool calls end"))
_DEEPSEEK_CALL = (_deepseek("tool call begin"), _deepseek("tool sep"), _deepseek("tool call end"))
_KIMI_SECTION = (
    "<|tool_calls_section_begin|>",
    "<|tool_calls_section_end|>",
    "<|tool_call_section_begin|>",
    "<|tool_call_section_end|>",
)
_KIMI_CALL = ("<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>")
DEEPSEEK_V3_SECTION = DeepseekV3Calls(_DEEPSEEK_SECTION, _DEEPSEEK_CALL)
DEEPSEEK_V3_1_SECTION = SectionCalls(_DEEPSEEK_SECTION, _DEEPSEEK_CALL)
KIMI_K2_SECTION = KimiCalls(_KIMI_SECTION, _KIMI_CALL)
