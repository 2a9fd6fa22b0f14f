"""Request bodies of the messages API, and how they become a chat."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, cast

import msgspec

from dynamo_core.errors import InvalidRequestError, UnsupportedMediaError
from dynamo_frontend._media.parts import PlacedPart
from dynamo_frontend._openai.fields import ChatRequest, FunctionSpec, ToolSpec

_THINKING_FIELDS = frozenset({"type", "budget_tokens", "display"})
_CHOICE_FIELDS = frozenset({"type", "name", "disable_parallel_tool_use"})


class AnthropicTool(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A tool of the caller."""

    name: str
    input_schema: dict[str, Any]
    description: str | None = None
    type: str | None = None
    cache_control: dict[str, Any] | None = None


class CountTokensRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Body of ``/v1/messages/count_tokens``: what makes up a prompt."""

    model: str
    messages: list[dict[str, Any]]
    system: str | list[dict[str, Any]] | None = None
    tools: list[AnthropicTool] | None = None
    tool_choice: dict[str, Any] | None = None
    thinking: dict[str, Any] | None = None


class MessagesRequest(CountTokensRequest, frozen=True, kw_only=True):
    """Body of ``/v1/messages``."""

    max_tokens: int
    stream: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    stop_sequences: list[str] | None = None
    metadata: dict[str, Any] | None = None
    service_tier: str | None = None


def to_chat(fields: CountTokensRequest) -> ChatRequest:
    """Return the same request as a chat.

    Raises:
        InvalidRequestError: naming the field that is wrong.
        UnsupportedMediaError: for content that is not text.
    """
    messages = _system(fields.system)
    for index, message in enumerate(fields.messages):
        messages.extend(_message(message, f"messages[{index}]"))
    choice, single = _tool_choice(fields.tool_choice)
    chat = ChatRequest(
        model=fields.model,
        messages=messages,
        tools=[_tool(tool) for tool in fields.tools] if fields.tools else None,
        tool_choice=choice,
        parallel_tool_calls=False if single else None,
        chat_template_kwargs=_thinking(fields.thinking),
    )
    if not isinstance(fields, MessagesRequest):
        return chat
    return msgspec.structs.replace(
        chat,
        max_tokens=fields.max_tokens,
        stream=fields.stream,
        temperature=fields.temperature,
        top_p=fields.top_p,
        top_k=fields.top_k,
        stop=cast("list[str | int] | None", fields.stop_sequences),
    )


def _system(system: str | list[dict[str, Any]] | None) -> list[dict[str, Any]]:
    if not system:
        return []
    text = system if isinstance(system, str) else "\n".join(_text(block, "system") for block in system)
    return [{"role": "system", "content": text}]


def _message(message: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    role, content = message.get("role"), message.get("content")
    if role not in ("user", "assistant"):
        raise InvalidRequestError(f"{where}.role is {role!r}; use 'user' or 'assistant'.", param=f"{where}.role")
    if isinstance(content, str):
        return [{"role": role, "content": content}]
    if not isinstance(content, list):
        raise InvalidRequestError(f"{where}.content must be text or a list of blocks.", param=f"{where}.content")
    blocks = cast("list[Any]", content)
    for index, block in enumerate(blocks):
        if not isinstance(block, dict):
            place = f"{where}.content[{index}]"
            raise InvalidRequestError(f"{place} must be an object with a type.", param=place)
    return _assistant(blocks, where) if role == "assistant" else _user(blocks, where)


def _user(blocks: list[dict[str, Any]], where: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    parts: list[dict[str, Any]] = []
    for index, block in enumerate(blocks):
        place = f"{where}.content[{index}]"
        if block.get("type") == "image":
            parts.append(_image(block, place))
        elif block.get("type") == "tool_result":
            content = _result(block.get("content"), place)
            found.append({"role": "tool", "tool_call_id": str(block.get("tool_use_id", "")), "content": content})
        else:
            parts.append({"type": "text", "text": _text(block, place)})
    if parts:
        found.append({"role": "user", "content": parts})
    return found


def _image(block: Mapping[str, Any], where: str) -> PlacedPart:
    source = block.get("source")
    fields = cast("dict[str, Any]", source) if isinstance(source, dict) else {}
    kind = fields.get("type")
    if kind == "base64":
        url: Any = f"data:{fields.get('media_type')};base64,{fields.get('data')}"
    elif kind == "url":
        url = fields.get("url")
    else:
        raise InvalidRequestError(
            f"{where}.source.type is {kind!r}; use 'base64' or 'url'.", param=f"{where}.source.type"
        )
    part = PlacedPart(type="image_url", image_url={"url": url})
    part.where = where
    return part


def _assistant(blocks: list[dict[str, Any]], where: str) -> list[dict[str, Any]]:
    texts: list[str] = []
    calls: list[dict[str, Any]] = []
    for index, block in enumerate(blocks):
        kind = block.get("type")
        if kind == "tool_use":
            function = {"name": block.get("name"), "arguments": json.dumps(block.get("input") or {})}
            calls.append({"id": block.get("id"), "type": "function", "function": function})
        elif kind not in ("thinking", "redacted_thinking"):
            texts.append(_text(block, f"{where}.content[{index}]"))
    message: dict[str, Any] = {"role": "assistant", "content": "\n".join(texts)}
    if calls:
        message["tool_calls"] = calls
    return [message]


def _result(content: Any, where: str) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list):
        raise InvalidRequestError(f"{where}.content must be text or a list of blocks.", param=f"{where}.content")
    return "\n".join(_text(block, where) for block in cast("list[dict[str, Any]]", content))


def _text(block: Any, where: str) -> str:
    fields = cast("dict[str, Any]", block) if isinstance(block, dict) else {}
    if fields.get("type") != "text":
        raise UnsupportedMediaError(
            f"{where} has type {fields.get('type')!r}, which this model does not take; send text.", param=where
        )
    text = fields.get("text")
    if not isinstance(text, str):
        raise InvalidRequestError(f"{where}.text must be text.", param=f"{where}.text")
    return text


def _tool(tool: AnthropicTool) -> ToolSpec:
    if tool.type not in (None, "custom"):
        raise InvalidRequestError(f"Tool type {tool.type!r} is not offered; send a custom tool.", param="tools")
    return ToolSpec("function", FunctionSpec(tool.name, tool.description, tool.input_schema))


def _tool_choice(choice: Mapping[str, Any] | None) -> tuple[str | dict[str, Any] | None, bool]:
    if choice is None:
        return None, False
    _only(choice, _CHOICE_FIELDS, "tool_choice")
    kind = choice.get("type")
    single = bool(choice.get("disable_parallel_tool_use"))
    if kind in ("auto", "none"):
        return str(kind), single
    if kind == "any":
        return "required", single
    if kind == "tool":
        return {"type": "function", "function": {"name": choice.get("name")}}, single
    raise InvalidRequestError(f"tool_choice.type is {kind!r}; use auto, any, tool or none.", param="tool_choice")


def _thinking(thinking: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if thinking is None:
        return None
    kind = thinking.get("type")
    _only(thinking, _THINKING_FIELDS, "thinking")
    if kind not in ("enabled", "disabled", "adaptive"):
        raise InvalidRequestError(f"thinking.type is {kind!r}; use enabled or disabled.", param="thinking")
    return {"enable_thinking": kind != "disabled"}


def _only(given: Mapping[str, Any], known: frozenset[str], where: str) -> None:
    for name in given:
        if name not in known:
            raise InvalidRequestError(f"Unknown field '{where}.{name}'. Remove it.", param=f"{where}.{name}")
