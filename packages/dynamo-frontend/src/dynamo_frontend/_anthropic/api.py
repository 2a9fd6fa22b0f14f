"""The handlers of the messages API."""

from __future__ import annotations

from typing import cast

import msgspec

from dynamo_core.enums import ModelType
from dynamo_core.errors import DynamoError
from dynamo_core.tokens import token_count
from dynamo_frontend._anthropic.fields import CountTokensRequest, MessagesRequest, to_chat
from dynamo_frontend._anthropic.writers import MessageStream, MessageWriter, send_anthropic_error
from dynamo_frontend._errors import http_status
from dynamo_frontend._generate_api import GenerateApi, ReplyForm
from dynamo_frontend._http.request import HttpRequest
from dynamo_frontend._http.response import HttpResponse
from dynamo_frontend._openai.fields import BodyDecoder
from dynamo_frontend._openai.stream import JSON, ReplyHead, StreamUsage
from dynamo_frontend._plan import GeneratePlan, plan_chat
from dynamo_frontend._reply import ReplyWriter
from dynamo_frontend._request_id import request_id_of

_MESSAGES = BodyDecoder(MessagesRequest)
_COUNT = BodyDecoder(CountTokensRequest)


class AnthropicApi:
    """Answers the messages API through the same pipeline as chat completions.

    Args:
        generate: The pipeline.
        overload_status: Status when all workers are busy.
    """

    def __init__(self, generate: GenerateApi, *, overload_status: int) -> None:
        self._generate = generate
        self._overload_status = overload_status

    async def messages(self, request: HttpRequest, response: HttpResponse) -> None:
        """``POST /v1/messages``."""
        try:
            fields = cast("MessagesRequest", _MESSAGES.decode(request.body))
            chat = to_chat(fields)
            model = self._generate.find(chat, ModelType.CHAT)
            form = ReplyForm("messages", "msg_", _writer)
            await self._generate.serve(chat, model, plan_chat, request, response, form)
        except DynamoError as error:
            self.refuse(error, request, response)

    async def count_tokens(self, request: HttpRequest, response: HttpResponse) -> None:
        """``POST /v1/messages/count_tokens``."""
        try:
            fields = cast("CountTokensRequest", _COUNT.decode(request.body))
            chat = to_chat(fields)
            plan = await plan_chat(chat, self._generate.find(chat, ModelType.CHAT), load_media=False)
        except DynamoError as error:
            self.refuse(error, request, response)
            return
        body = {"input_tokens": sum(token_count(prompt) for prompt in plan.prompts)}
        response.send(200, msgspec.json.encode(body), JSON, {"x-request-id": request_id_of(request)})

    def refuse(self, error: DynamoError, request: HttpRequest, response: HttpResponse) -> None:
        """Answer an error in this API's form."""
        status = http_status(error, self._overload_status)
        send_anthropic_error(response, error, status, {"x-request-id": request_id_of(request)})


def _writer(response: HttpResponse, plan: GeneratePlan, head: ReplyHead, usage: StreamUsage) -> ReplyWriter:
    if plan.fields.stream:
        return MessageStream(response, head, usage.current)
    return MessageWriter(response, head)
