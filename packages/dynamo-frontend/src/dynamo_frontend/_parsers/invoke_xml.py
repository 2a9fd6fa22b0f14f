"""Calls as ``invoke`` elements with ``parameter`` elements: ``minimax_m2``, ``deepseek_v3_2`` and ``deepseek_v4``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dynamo_core.parsing import ParserContext
from dynamo_frontend._parsers.machine import MAX_BLANK, Cursor, Markers, Steps
from dynamo_frontend._parsers.typed import (
    STRING,
    UNKNOWN,
    ArgumentWriter,
    property_schema,
    schema_types,
    tool_schema,
)

_DSML = "\uff5cDSML\uff5c"
_QUOTE = Markers('"')


class InvokeXml:
    """Grammar of a block of ``invoke`` elements.

    Args:
        block: Name of the block's element.
        prefix: What stands before the names of the other elements.
        typed: Whether a parameter says itself whether it is a string (``string="true"``). Else its schema does, and a
            line break at either end of its value belongs to the markup.
    """

    def __init__(self, block: str, prefix: str = "", *, typed: bool = False) -> None:
        self._open, self._close = f"<{block}>", f"</{block}>"
        self._invoke, self._invoke_end = f'<{prefix}invoke name="', f"</{prefix}invoke>"
        self._parameter, parameter_end = f'<{prefix}parameter name="', f"</{prefix}parameter>"
        self.texts = (self._open, self._close, self._invoke, self._invoke_end, self._parameter, parameter_end)
        self._typed = typed
        self._starts = Markers(self._open, self._close)
        self._ends = Markers(parameter_end) if typed else Markers("\n" + parameter_end, parameter_end)
        self._rest = Markers(self._invoke_end, self._close)

    def __call__(self, cursor: Cursor, context: ParserContext) -> Steps[None]:
        """Read the output of one choice."""
        while marker := (yield from cursor.prose(self._starts)):
            cursor.mark()
            yield from cursor.spaces(MAX_BLANK)
            if marker == self._close or not (yield from cursor.accept(self._invoke)):
                yield from cursor.give_back("" if marker == self._close else marker)
                continue
            tag = self._invoke
            while tag == self._invoke:
                yield from self._call(cursor, context)
                tag = yield from self._between(cursor)

    def _between(self, cursor: Cursor) -> Steps[str]:
        """Read what follows a call: another one, or the block's end."""
        if cursor.out.calling:
            cursor.out.end()
        cursor.mark()
        yield from cursor.spaces(MAX_BLANK)
        tag = yield from cursor.accept(self._invoke, self._close)
        if tag:
            cursor.release()
        else:
            cursor.rewind()
        return tag

    def _call(self, cursor: Cursor, context: ParserContext) -> Steps[None]:
        cursor.mark()
        name = (yield from cursor.name('"'))[0]
        if not name or not (yield from cursor.accept(">")):
            yield from cursor.give_back()
            return
        cursor.release()
        cursor.out.start(name)
        writer = ArgumentWriter(cursor.out)
        schema = tool_schema(context, name)
        while True:
            yield from cursor.spaces()
            tag = yield from cursor.accept(self._parameter, self._invoke_end)
            if tag == self._invoke_end:
                writer.end()
                return
            if not tag or not (yield from self._argument(cursor, writer, schema)):
                yield from cursor.until(self._rest, cursor.out.arguments)
                return

    def _argument(self, cursor: Cursor, writer: ArgumentWriter, schema: Mapping[str, Any]) -> Steps[bool]:
        key, end = yield from cursor.collect(_QUOTE)
        if not end:
            return False
        declared = schema_types(property_schema(schema, key))
        if self._typed:
            flag = yield from cursor.accept(' string="true">', ' string="false">', ">")
            types = STRING if "true" in flag else declared - STRING or UNKNOWN
        else:
            flag = yield from cursor.accept(">")
            types = declared or STRING
        if not flag:
            return False
        writer.key(key)
        if not self._typed:
            yield from cursor.accept("\n")
        return bool((yield from writer.value(cursor, types, self._ends)))


MINIMAX_XML = InvokeXml("minimax:tool_call")
DSML_V3_2 = InvokeXml(_DSML + "function_calls", _DSML, typed=True)
DSML_V4 = InvokeXml(_DSML + "tool_calls", _DSML, typed=True)
