"""Chat messages: checked, and brought into the form that chat templates expect."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, cast

from dynamo_core.errors import InvalidRequestError
from dynamo_frontend._media.parts import MediaCollector

_ROLES = frozenset({"system", "developer", "user", "assistant", "tool"})
_FIELDS = frozenset(
    {"role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content", "reasoning", "refusal"}
)
_TEXT_PARTS = frozenset({"text", "input_text", "output_text", "refusal"})


def template_messages(
    messages: Sequence[dict[str, Any]], media: MediaCollector, *, as_parts: bool = False
) -> list[dict[str, Any]]:
    """Return the messages with text contents and tool arguments as objects.

    With ``as_parts`` a content with media stays a list of parts, in which ``{"type": "image"}`` and the like stand for
    them. Without, only its text is left, and the worker places the media.

    Raises:
        InvalidRequestError: naming the message and field that is wrong.
        UnsupportedMediaError: for content that the model does not take.
    """
    if not messages:
        raise InvalidRequestError("messages is empty; send at least one message.", param="messages")
    found = [_message(message, f"messages[{index}]", media) for index, message in enumerate(messages)]
    for message in found:
        if isinstance(message["content"], list) and not as_parts:
            message["content"] = "\n".join(part["text"] for part in message["content"] if part["type"] == "text")
    return found


def _message(message: dict[str, Any], where: str, media: MediaCollector) -> dict[str, Any]:
    role = message.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        raise InvalidRequestError(
            f"{where}.role is {role!r}; use one of {', '.join(sorted(_ROLES))}.", param=f"{where}.role"
        )
    for field in message:
        if field not in _FIELDS:
            raise InvalidRequestError(f"Unknown field '{where}.{field}'. Remove it.", param=f"{where}.{field}")
    found = dict(message)
    found["role"] = "system" if role == "developer" else role
    found["content"] = _content(message.get("content"), where, media, optional=role == "assistant")
    if message.get("tool_calls") is not None:
        found["tool_calls"] = _tool_calls(message["tool_calls"], where)
    return found


def _content(content: Any, where: str, media: MediaCollector, *, optional: bool) -> str | list[dict[str, Any]] | None:
    if isinstance(content, str):
        return content
    if content is None and optional:
        return None
    if not isinstance(content, list):
        raise InvalidRequestError(f"{where}.content must be text or a list of parts.", param=f"{where}.content")
    parts = [_part(part, f"{where}.content[{i}]", media) for i, part in enumerate(cast("list[Any]", content))]
    if all(part["type"] == "text" for part in parts):
        return "\n".join(part["text"] for part in parts)
    return parts


def _part(part: Any, where: str, media: MediaCollector) -> dict[str, Any]:
    if not isinstance(part, dict):
        raise InvalidRequestError(f"{where} must be an object with a type.", param=where)
    fields = cast("dict[str, Any]", part)
    kind = fields.get("type")
    if not isinstance(kind, str) or kind not in _TEXT_PARTS:
        return media.add(fields, where)
    text = fields.get("text", fields.get("refusal"))
    if not isinstance(text, str):
        raise InvalidRequestError(f"{where}.text must be text.", param=f"{where}.text")
    return {"type": "text", "text": text}


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
