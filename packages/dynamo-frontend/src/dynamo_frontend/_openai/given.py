"""What a body holds at the place that a decoder complains of."""

from __future__ import annotations

import re
from typing import Any, cast

import msgspec

_LONGEST = 60
_STEP = re.compile(r"\.(?P<key>[^.\[\]]+)|\[(?P<index>\d+)\]")


def given_value(body: bytes, path: str) -> str:
    """Return the value at a path as JSON, shortened to be shown; empty if the path does not lead to one value.

    Args:
        body: The body, of which at least the part before the place is JSON.
        path: As the decoder writes it without ``$``, for example ``.messages[0].role``.
    """
    try:
        value = _walk(msgspec.json.decode(body), path)
        shown = msgspec.json.encode(value).decode()
    except (msgspec.DecodeError, UnicodeError, RecursionError, LookupError):
        return ""
    return shown if len(shown) <= _LONGEST else f"{shown[:_LONGEST]}…"


def _walk(value: Any, path: str) -> Any:
    end = 0
    while end < len(path):
        step = _STEP.match(path, end)
        if step is None:
            raise LookupError(path)
        end = step.end()
        value = _inside(value, step["key"], step["index"])
    return value


def _inside(value: Any, key: str | None, index: str | None) -> Any:
    if key is not None and isinstance(value, dict):
        return cast("dict[str, Any]", value)[key]
    if index is not None and isinstance(value, list):
        return cast("list[Any]", value)[int(index)]
    raise LookupError(key or index)
