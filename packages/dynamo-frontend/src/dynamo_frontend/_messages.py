"""Chat messages: checked, and brought into the form that chat templates expect."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, cast

from dynamo_core.errors import InvalidRequestError, UnsupportedMediaError

_ROLES = frozenset({"system", "developer", "user", "assistant", "tool"})
_FIELDS = frozenset(
    {"role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content", "reasoning", "refusal"}
)
_TEXT_PARTS = frozenset({"text", "input_text", "output_text", "refusal"})


def template_messages(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the messages with text contents and tool arguments as objects.

    Raises:
        InvalidRequestError: naming the message and field that is wrong.
        UnsupportedMediaError: for content that is not text.
    """
    if not messages:
        raise InvalidRequestError("messages is empty; send at least one message.", param="messages")
    return [_message(message, f"messages[{index}]") for index, message in enumerate(messages)]


def _message(message: dict[str, Any], where: str) -> dict[str, Any]:
    role = message.get("role")
    if role not in _ROLES:
        raise InvalidRequestError(
            f"{where}.role is {role!r}; use one of {', '.join(sorted(_ROLES))}.", param=f"{where}.role"
        )
    for field in message:
        if field not in _FIELDS:
            raise InvalidRequestError(f"Unknown field '{where}.{field}'. Remove it.", param=f"{where}.{field}")
    found = dict(message)
    found["role"] = "system" if role == "developer" else role
    found["content"] = _content(message.get("content"), where, optional=role == "assistant")
    if message.get("tool_calls") is not None:
        found["tool_calls"] = _tool_calls(message["tool_calls"], where)
    return found


def _content(content: Any, where: str, *, optional: bool) -> str | None:
    if isinstance(content, str):
        return content
    if content is None and optional:
        return None
    if not isinstance(content, list):
        raise InvalidRequestError(f"{where}.content must be text or a list of parts.", param=f"{where}.content")
    parts = cast("list[Any]", content)
    return "\n".join(_part(part, f"{where}.content[{index}]") for index, part in enumerate(parts))


def _part(part: Any, where: str) -> str:
    if not isinstance(part, dict):
        raise InvalidRequestError(f"{where} must be an object with a type.", param=where)
    fields = cast("dict[str, Any]", part)
    kind = fields.get("type")
    if kind not in _TEXT_PARTS:
        raise UnsupportedMediaError(
            f"{where} has type {kind!r}, which this model does not take; send text.", param=where
        )
    text = fields.get("text", fields.get("refusal"))
    if not isinstance(text, str):
        raise InvalidRequestError(f"{where}.text must be text.", param=f"{where}.text")
    return text


def _tool_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(calls, list):
        raise InvalidRequestError(f"{where}.tool_calls must be a list.", param=f"{where}.tool_calls")
    return [_tool_call(call, f"{where}.tool_calls[{index}]") for index, call in enumerate(cast("list[Any]", calls))]


def _tool_call(call: Any, where: str) -> dict[str, Any]:
    fields = cast("dict[str, Any]", call) if isinstance(call, dict) else {}
    function = fields.get("function")
    named = cast("dict[str, Any]", function) if isinstance(function, dict) else {}
    if not isinstance(named.get("name"), str):
        raise InvalidRequestError(f"{where}.function.name must be text.", param=f"{where}.function.name")
    return {**fields, "function": {**named, "arguments": _arguments(named.get("arguments"))}}


def _arguments(arguments: Any) -> Any:
    """Templates print arguments as an object; the API carries them as JSON text."""
    if not isinstance(arguments, str):
        return arguments if arguments is not None else {}
    try:
        return json.loads(arguments)
    except ValueError:
        return arguments
