"""Tools and answer forms of a chat: which the model sees, which constrain its output, which are refused."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, cast

import msgspec

from dynamo_core.errors import InvalidRequestError
from dynamo_core.requests import GuidedDecoding
from dynamo_frontend._catalog import ServedModel
from dynamo_frontend._openai.fields import ChatRequest, ToolSpec
from dynamo_frontend._openai.options import require_guided
from dynamo_frontend._parsers.contract import OutputParser
from dynamo_frontend._parsers.forced import forced_call, forced_calls

MAX_TOOLS = 128


@dataclass(frozen=True, slots=True)
class ToolPlan:
    """What the tools of a chat mean for its prompt and output.

    Attributes:
        tools: Tools that the model sees.
        guided: Constraint that makes the output a call; None if the model may choose.
        parser: Makes the parser of a constrained output; None if the model's own parser reads it.
    """

    tools: Sequence[dict[str, Any]] = ()
    guided: GuidedDecoding | None = None
    parser: Callable[[], OutputParser] | None = None


_NO_TOOLS = ToolPlan()


def chosen_tools(fields: ChatRequest, model: ServedModel) -> ToolPlan:
    """Return what the tools of a chat mean.

    Raises:
        InvalidRequestError: if the model's output cannot be read for calls, or the choice cannot be enforced.
    """
    choice = fields.tool_choice
    if not fields.tools:
        if choice not in (None, "none", "auto"):
            raise InvalidRequestError("tool_choice needs tools.", param="tool_choice")
        return _NO_TOOLS
    _check_tools(fields.tools)
    if choice == "none":
        return _NO_TOOLS
    tools = [cast("dict[str, Any]", msgspec.to_builtins(tool)) for tool in fields.tools]
    if choice not in (None, "auto"):
        return _forced(choice, tools, model.card.capabilities)
    if not model.text.tool_parser:
        raise InvalidRequestError(
            f"The model '{model.name}' has no tool-call parser, so its calls could not be read. Leave tools out, or "
            "start the frontend with --tool-call-parser.",
            param="tools",
        )
    return ToolPlan(tools)


def _check_tools(tools: Sequence[ToolSpec]) -> None:
    if len(tools) > MAX_TOOLS:
        raise InvalidRequestError(f"tools has {len(tools)} entries; send at most {MAX_TOOLS}.", param="tools")
    for index, tool in enumerate(tools):
        if tool.type != "function":
            raise InvalidRequestError(
                f"tools[{index}].type is {tool.type!r}; only 'function' is offered.", param=f"tools[{index}].type"
            )


def _forced(choice: str | dict[str, Any], tools: list[dict[str, Any]], capabilities: Collection[str]) -> ToolPlan:
    """Return the plan of a choice that must be a call: the output is constrained to one, so it needs no markers."""
    require_guided(capabilities, "tool_choice")
    by_name = {str(tool["function"]["name"]): tool for tool in tools}
    if choice == "required":
        schema = {"type": "array", "minItems": 1, "items": {"anyOf": [_call_schema(tool) for tool in tools]}}
        return ToolPlan(tools, GuidedDecoding(json=schema), forced_calls)
    name = str((choice.get("function") or {}).get("name")) if isinstance(choice, dict) else ""
    if name not in by_name:
        raise InvalidRequestError(
            "tool_choice must be 'auto', 'none', 'required' or name one of the tools: "
            '{"type": "function", "function": {"name": ...}}.',
            param="tool_choice",
        )
    guided = GuidedDecoding(json=_parameters(by_name[name]))
    return ToolPlan(tools, guided, lambda: forced_call(name))


def _call_schema(tool: dict[str, Any]) -> dict[str, Any]:
    properties = {"name": {"const": tool["function"]["name"]}, "arguments": _parameters(tool)}
    return {
        "type": "object",
        "properties": properties,
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }


def _parameters(tool: dict[str, Any]) -> dict[str, Any]:
    return tool["function"].get("parameters") or {"type": "object"}


def response_constraint(
    fields: ChatRequest, guided: GuidedDecoding | None, capabilities: Collection[str]
) -> GuidedDecoding | None:
    """Return the constraint that ``response_format`` or a guided field asks for.

    Raises:
        InvalidRequestError: for two constraints, an unknown form, or an engine that cannot constrain.
    """
    form = fields.response_format
    if form is None or form.type == "text":
        return guided
    if form.type not in ("json_object", "json_schema"):
        raise InvalidRequestError(
            f"response_format.type is {form.type!r}; use 'text', 'json_object' or 'json_schema'.",
            param="response_format.type",
        )
    require_guided(capabilities, "response_format")
    if guided is not None:
        raise InvalidRequestError("response_format and a guided field contradict each other.", param="response_format")
    if form.type == "json_object":
        return GuidedDecoding(json={"type": "object"})
    schema = (form.json_schema or {}).get("schema")
    if not isinstance(schema, dict):
        raise InvalidRequestError(
            "response_format.json_schema.schema must be a JSON schema.", param="response_format.json_schema"
        )
    return GuidedDecoding(json=schema)
