"""Tools and answer forms of a chat: which the model sees, which constrain its output, which are refused."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import msgspec

from dynamo_core.errors import InvalidRequestError
from dynamo_core.requests import GuidedDecoding
from dynamo_frontend._catalog import ServedModel
from dynamo_frontend._openai.fields import ChatRequest
from dynamo_frontend._openai.options import require_guided

MAX_TOOLS = 128


def chosen_tools(fields: ChatRequest, model: ServedModel) -> list[dict[str, Any]] | None:
    """Return the tools for the template, or None.

    Raises:
        InvalidRequestError: if the model's output cannot be read for calls, or the choice cannot be enforced.
    """
    choice = fields.tool_choice
    if not fields.tools:
        if choice not in (None, "none", "auto"):
            raise InvalidRequestError("tool_choice needs tools.", param="tool_choice")
        return None
    if len(fields.tools) > MAX_TOOLS:
        raise InvalidRequestError(f"tools has {len(fields.tools)} entries; send at most {MAX_TOOLS}.", param="tools")
    for index, tool in enumerate(fields.tools):
        if tool.type != "function":
            raise InvalidRequestError(
                f"tools[{index}].type is {tool.type!r}; only 'function' is offered.", param=f"tools[{index}].type"
            )
    if choice == "none":
        return None
    if choice not in (None, "auto"):
        raise InvalidRequestError(
            f"tool_choice {choice if isinstance(choice, str) else 'by name'!r} is not offered; use 'auto' or 'none'.",
            param="tool_choice",
        )
    if not model.text.tool_parser:
        raise InvalidRequestError(
            f"The model '{model.name}' has no tool-call parser, so its calls could not be read. Leave tools out, or "
            "start the frontend with --tool-call-parser.",
            param="tools",
        )
    return [msgspec.to_builtins(tool) for tool in fields.tools]


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
