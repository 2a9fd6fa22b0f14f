"""The channels of gpt-oss: ``harmony`` finds calls, ``gpt_oss`` finds reasoning.

Output is a row of messages, ``<|start|>assistant<|channel|>analysis<|message|>...<|end|>``. The first one begins
in the prompt. A call names its function as the recipient, before the channel or behind it.
"""

from __future__ import annotations

import re

from dynamo_core.parsing import ParserContext
from dynamo_frontend._parsers.json_text import json_value
from dynamo_frontend._parsers.machine import MAX_BLANK, Cursor, Markers, Steps

_START = "<|start|>"
_CHANNEL = "<|channel|>"
_CONSTRAIN = "<|constrain|>"
_MESSAGE = "<|message|>"
_END = "<|end|>"
_CALL = "<|call|>"
_RETURN = "<|return|>"
_FUNCTIONS = "functions."
_ALL = Markers(_START, _CHANNEL, _CONSTRAIN, _MESSAGE, _END, _CALL, _RETURN)
_HEADER_ENDS = Markers(_MESSAGE, _START, _END, _CALL, _RETURN)
_BODY_ENDS = Markers(_END, _CALL, _RETURN, _START, _CHANNEL)
_RECIPIENT = re.compile(r"\bto=([^\s<]+)")
_CHANNEL_NAME = re.compile(r"<\|channel\|>\s*(\w+)")
TEXTS = (_START, _CHANNEL, _CONSTRAIN, _MESSAGE, _END, _CALL, _RETURN)


class Harmony:
    """Grammar of the channels.

    Args:
        calls: Whether to read calls. Else they are passed on as they are, for the parser behind.
    """

    def __init__(self, *, calls: bool) -> None:
        self._calls = calls

    def __call__(self, cursor: Cursor, context: ParserContext) -> Steps[None]:
        """Read the output of one choice."""
        text = cursor.out.text if self._calls else cursor.out.plain
        in_header = yield from self._begins_in_header(cursor)
        marker = _START if in_header else (yield from cursor.until(_ALL, text))
        role = "assistant" if in_header else ""
        while marker:
            if marker in (_START, _CHANNEL, _MESSAGE):
                marker = yield from self._message(cursor, context, marker + role)
            else:
                marker = ""
            role = ""
            marker = marker or (yield from cursor.until(_ALL, text))

    def _begins_in_header(self, cursor: Cursor) -> Steps[bool]:
        """Return whether the output begins with a recipient, its role being part of the prompt."""
        cursor.mark()
        yield from cursor.spaces(MAX_BLANK)
        found = yield from cursor.accept("to=")
        cursor.rewind()
        return bool(found)

    def _message(self, cursor: Cursor, context: ParserContext, header: str) -> Steps[str]:
        """Read a message whose header is taken so far; return the marker of the next, if it is taken too."""
        if header != _MESSAGE:
            rest, end = yield from cursor.collect(_HEADER_ENDS)
            header += rest
            if end != _MESSAGE:
                return end if end == _START else ""
        name = _function(header, context)
        if name and self._calls:
            end = yield from self._call(cursor, name)
        elif name:
            end = yield from self._pass_on(cursor, header)
        else:
            channel = _CHANNEL_NAME.search(header)
            out = cursor.out
            visible = out.text if self._calls else out.plain
            reasoning = channel is not None and channel[1] == "analysis"
            end = yield from cursor.until(_BODY_ENDS, out.reasoning if reasoning else visible)
        return end if end in (_START, _CHANNEL) else ""

    def _call(self, cursor: Cursor, name: str) -> Steps[str]:
        cursor.out.start(name)
        yield from cursor.spaces(MAX_BLANK)
        whole = yield from json_value(cursor, cursor.out.arguments)
        if whole:
            cursor.out.end()
            return (yield from cursor.collect(_BODY_ENDS))[1]
        rest, end = yield from cursor.collect(_BODY_ENDS)
        cursor.out.arguments("{}" if end and cursor.out.arguments_are_empty and not rest.strip() else rest)
        cursor.out.end()
        return end

    def _pass_on(self, cursor: Cursor, header: str) -> Steps[str]:
        plain = cursor.out.plain
        plain((header if header.startswith(_START) else f"{_START}assistant{header}") + _MESSAGE)
        end = yield from cursor.until(_BODY_ENDS, plain)
        if end:
            plain(_CALL)
        return end


def _function(header: str, context: ParserContext) -> str:
    """Return the function that a message calls, or an empty string."""
    found = _RECIPIENT.search(header)
    if found is None:
        return ""
    recipient = found[1]
    if recipient.startswith(_FUNCTIONS):
        return recipient[len(_FUNCTIONS) :]
    return recipient if recipient in context.tools else ""


CALLS = Harmony(calls=True)
CHANNELS = Harmony(calls=False)
