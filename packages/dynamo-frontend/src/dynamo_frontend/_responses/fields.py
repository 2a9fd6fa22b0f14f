"""Request bodies of the responses API, and how they become a chat."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import msgspec

from dynamo_core.errors import InvalidRequestError
from dynamo_frontend._openai.fields import ChatRequest, FunctionSpec, ResponseFormat, ToolSpec


class FunctionTool(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A function the model may call."""

    type: str
    name: str = ""
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class TextOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Form of the text."""

    format: dict[str, Any] | None = None


class ReasoningOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Depth of the reasoning."""

    effort: str | None = None
    summary: str | None = None


class InputTokensRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Body of ``/v1/responses/input_tokens``: what makes up a prompt."""

    model: str
    input: str | list[dict[str, Any]]
    instructions: str | None = None
    tools: list[FunctionTool] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    truncation: str | None = None


class ResponsesRequest(InputTokensRequest, frozen=True, kw_only=True):
    """Body of ``/v1/responses``."""

    stream: bool | None = None
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    store: bool | None = None
    background: bool | None = None
    include: list[str] | None = None
    metadata: dict[str, Any] | None = None
    user: str | None = None
    safety_identifier: str | None = None
    service_tier: str | None = None
    prompt_cache_key: str | None = None


def to_chat(fields: InputTokensRequest) -> ChatRequest:
    """Return the same request as a chat.

    Raises:
        InvalidRequestError: naming the field that is wrong or not offered.
    """
    if fields.truncation not in (None, "disabled"):
        raise InvalidRequestError("truncation other than 'disabled' is not offered.", param="truncation")
    if fields.reasoning is not None and fields.reasoning.summary is not None:
        raise InvalidRequestError("Summaries of reasoning are not offered; leave it out.", param="reasoning.summary")
    chat = ChatRequest(
        model=fields.model,
        messages=_messages(fields),
        tools=[_tool(tool) for tool in fields.tools] if fields.tools else None,
        tool_choice=_tool_choice(fields.tool_choice),
        parallel_tool_calls=fields.parallel_tool_calls,
        response_format=_format(fields.text),
        reasoning_effort=fields.reasoning.effort if fields.reasoning is not None else None,
    )
    return _with_sampling(chat, fields) if isinstance(fields, ResponsesRequest) else chat


def _with_sampling(chat: ChatRequest, fields: ResponsesRequest) -> ChatRequest:
    for name in ("store", "background", "include"):
        if getattr(fields, name):
            raise InvalidRequestError(f"{name} is not offered: nothing is stored here. Leave it out.", param=name)
    return msgspec.structs.replace(
        chat,
        stream=fields.stream,
        max_completion_tokens=fields.max_output_tokens,
        temperature=fields.temperature,
        top_p=fields.top_p,
        prompt_cache_key=fields.prompt_cache_key,
    )


def _messages(fields: InputTokensRequest) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    if fields.instructions:
        found.append({"role": "system", "content": fields.instructions})
    if isinstance(fields.input, str):
        return [*found, {"role": "user", "content": fields.input}]
    for index, item in enumerate(fields.input):
        _add_item(item, f"input[{index}]", found)
    return found


def _add_item(item: Mapping[str, Any], where: str, found: list[dict[str, Any]]) -> None:
    kind = item.get("type", "message")
    if kind == "message":
        found.append({"role": item.get("role"), "content": item.get("content")})
    elif kind == "function_call":
        function = {"name": item.get("name"), "arguments": item.get("arguments")}
        call = {"id": item.get("call_id"), "type": "function", "function": function}
        last = found[-1] if found else {}
        if last.get("role") == "assistant" and "tool_calls" in last:
            cast("list[Any]", last["tool_calls"]).append(call)
        else:
            found.append({"role": "assistant", "content": "", "tool_calls": [call]})
    elif kind == "function_call_output":
        found.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": item.get("output")})
    elif kind != "reasoning":
        raise InvalidRequestError(
            f"{where}.type is {kind!r}; use message, function_call or function_call_output.", param=f"{where}.type"
        )


def _tool(tool: FunctionTool) -> ToolSpec:
    if tool.type != "function":
        raise InvalidRequestError(f"Tool type {tool.type!r} is not offered; send functions.", param="tools")
    if not tool.name:
        raise InvalidRequestError("A tool has no name. Add it.", param="tools")
    return ToolSpec("function", FunctionSpec(tool.name, tool.description, tool.parameters, tool.strict))


def _tool_choice(choice: str | dict[str, Any] | None) -> str | dict[str, Any] | None:
    if isinstance(choice, dict):
        return {"type": "function", "function": {"name": choice.get("name")}}
    return choice


def _format(text: TextOptions | None) -> ResponseFormat | None:
    given = text.format if text is not None else None
    if given is None:
        return None
    kind = str(given.get("type"))
    schema = {"name": given.get("name"), "schema": given.get("schema")} if kind == "json_schema" else None
    return ResponseFormat(kind, schema)
