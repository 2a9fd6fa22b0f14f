"""Tool calls in hermes form: ``<tool_call>{"name": ..., "arguments": {...}}</tool_call>``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, cast

from dynamo_frontend._parsers.contract import ParsedDelta, TextDelta, ToolCallDelta
from dynamo_frontend._parsers.markers import MarkerScanner

_OPEN = "<tool_call>"
_CLOSE = "</tool_call>"


class HermesToolParser:
    """Parser of hermes tool calls.

    A call is given once it is complete. What stands between the tags and is no call is given back as text, markup
    included, so that nothing the model wrote is lost.
    """

    def __init__(self) -> None:
        self._scanner = MarkerScanner()
        self._call: list[str] | None = None
        self._blank = ""
        self._after_call = False

    def feed(self, text: str) -> Sequence[ParsedDelta]:
        """Take the next text."""
        found: list[ParsedDelta] = []
        while True:
            before, hit = self._scanner.scan(text, _OPEN if self._call is None else _CLOSE)
            self._take(before, found)
            if not hit:
                return found
            text = ""
            if self._call is None:
                self._blank = ""
                self._call = []
                continue
            found.append(parse_call("".join(self._call)))
            self._call = None
            self._after_call = True

    def finish(self) -> Sequence[ParsedDelta]:
        """Return what was held back; an unfinished call that already reads as one counts."""
        found: list[ParsedDelta] = []
        rest = self._scanner.take()
        if self._call is None:
            self._take(rest, found)
            if self._blank and not self._after_call:
                found.append(TextDelta(self._blank))
            return found
        body = "".join(self._call) + rest
        call = parse_call(body)
        found.append(call if isinstance(call, ToolCallDelta) else TextDelta(_OPEN + body))
        self._call = None
        return found

    def _take(self, text: str, found: list[ParsedDelta]) -> None:
        if self._call is not None:
            self._call.append(text)
            return
        # White space before a call is part of the markup; it is given only once other text follows it.
        text = self._blank + text
        visible = text.rstrip()
        self._blank = text[len(visible) :]
        if visible:
            self._after_call = False
            found.append(TextDelta(visible))


def parse_call(body: str) -> ToolCallDelta | TextDelta:
    """Read the JSON between the tags; text that is no call comes back with its tags."""
    try:
        loaded = json.loads(body)
    except ValueError:
        return TextDelta(f"{_OPEN}{body}{_CLOSE}")
    call = cast("dict[str, Any]", loaded) if isinstance(loaded, dict) else {}
    name = call.get("name")
    if not isinstance(name, str) or not name:
        return TextDelta(f"{_OPEN}{body}{_CLOSE}")
    arguments = call.get("arguments", call.get("parameters", {}))
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return ToolCallDelta(name, text)
