"""The handlers of the responses API."""

from __future__ import annotations

from typing import Any, cast

import msgspec

from dynamo_core.enums import ModelType
from dynamo_core.tokens import token_count
from dynamo_frontend._generate_api import GenerateApi, ReplyForm
from dynamo_frontend._http.request import HttpRequest
from dynamo_frontend._http.response import HttpResponse
from dynamo_frontend._openai.fields import BodyDecoder
from dynamo_frontend._openai.stream import JSON, ReplyHead, StreamUsage
from dynamo_frontend._plan import GeneratePlan, plan_chat
from dynamo_frontend._reply import ReplyWriter
from dynamo_frontend._request_id import request_id_of
from dynamo_frontend._responses.fields import InputTokensRequest, ResponsesRequest, to_chat
from dynamo_frontend._responses.writer import ResponseWriter

_RESPONSES = BodyDecoder(ResponsesRequest)
_INPUT_TOKENS = BodyDecoder(InputTokensRequest)


class ResponsesApi:
    """Answers the responses API through the same pipeline as chat completions.

    Args:
        generate: The pipeline.
    """

    def __init__(self, generate: GenerateApi) -> None:
        self._generate = generate

    async def responses(self, request: HttpRequest, response: HttpResponse) -> None:
        """``POST /v1/responses``."""
        fields = cast("ResponsesRequest", _RESPONSES.decode(request.body))
        chat = to_chat(fields)
        echo = _echo(fields)

        def writer(to: HttpResponse, plan: GeneratePlan, head: ReplyHead, usage: StreamUsage) -> ReplyWriter:
            return ResponseWriter(to, head, echo, stream=bool(fields.stream))

        model = self._generate.find(chat, ModelType.CHAT)
        await self._generate.serve(chat, model, plan_chat, request, response, ReplyForm("responses", "resp_", writer))

    async def input_tokens(self, request: HttpRequest, response: HttpResponse) -> None:
        """``POST /v1/responses/input_tokens``."""
        fields = cast("InputTokensRequest", _INPUT_TOKENS.decode(request.body))
        chat = to_chat(fields)
        plan = await plan_chat(chat, self._generate.find(chat, ModelType.CHAT), load_media=False)
        count = sum(token_count(prompt) for prompt in plan.prompts)
        body = msgspec.json.encode({"object": "response.input_tokens", "input_tokens": count})
        response.send(200, body, JSON, {"x-request-id": request_id_of(request)})


def _echo(fields: ResponsesRequest) -> dict[str, Any]:
    return {
        "instructions": fields.instructions,
        "max_output_tokens": fields.max_output_tokens,
        "metadata": fields.metadata or {},
        "parallel_tool_calls": fields.parallel_tool_calls is not False,
        "reasoning": {"effort": fields.reasoning.effort if fields.reasoning else None, "summary": None},
        "temperature": fields.temperature,
        "text": {"format": (fields.text.format if fields.text else None) or {"type": "text"}},
        "tool_choice": fields.tool_choice or "auto",
        "tools": msgspec.to_builtins(fields.tools or []),
        "top_p": fields.top_p,
        "user": fields.user,
    }
