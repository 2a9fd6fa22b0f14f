"""Text to token ids and back, in the form of vLLM's ``/tokenize`` and ``/detokenize``."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import msgspec

from dynamo_core.errors import InvalidRequestError
from dynamo_core.tokens import unpack_tokens
from dynamo_frontend._catalog import ServedModel
from dynamo_frontend._generate_api import GenerateApi
from dynamo_frontend._http.request import HttpRequest
from dynamo_frontend._http.response import HttpResponse
from dynamo_frontend._openai.fields import BodyDecoder, ChatRequest, ToolSpec
from dynamo_frontend._openai.stream import JSON
from dynamo_frontend._plan import check_token_ids, collector, render_chat
from dynamo_frontend._request_id import request_id_of
from dynamo_frontend._tools import chosen_tools

_INLINE_TOKENS = 4096


class TokenizeRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Body of ``/tokenize``: a text, or a conversation as the model's template renders it."""

    model: str
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    tools: list[ToolSpec] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Body of ``/detokenize``."""

    model: str
    tokens: list[int]


_TOKENIZE = BodyDecoder(TokenizeRequest)
_DETOKENIZE = BodyDecoder(DetokenizeRequest)
_OF_CHATS = ("tools", "add_generation_prompt", "continue_final_message", "chat_template_kwargs")


class TextApi:
    """Shows how the models' tokenizers read and write text; no worker takes part.

    Args:
        generate: Finds models.
    """

    def __init__(self, generate: GenerateApi) -> None:
        self._generate = generate

    async def tokenize(self, request: HttpRequest, response: HttpResponse) -> None:
        """``POST /tokenize``."""
        fields = cast("TokenizeRequest", _TOKENIZE.decode(request.body))
        model = self._generate.services.catalog.find(fields.model)
        text, special = _text(fields, model)
        packed = await model.text.tokenizer.encode(text, add_special_tokens=special)
        ids = list(unpack_tokens(packed))
        strings: list[str | None] | None = None
        if fields.return_token_strs:
            strings = [model.text.tokenizer.tokenizer.id_to_token(token) for token in ids]
        body = {
            "count": len(ids),
            "max_model_len": model.card.context_length or None,
            "tokens": ids,
            "token_strs": strings,
        }
        response.send(200, msgspec.json.encode(body), JSON, {"x-request-id": request_id_of(request)})

    async def detokenize(self, request: HttpRequest, response: HttpResponse) -> None:
        """``POST /detokenize``."""
        fields = cast("DetokenizeRequest", _DETOKENIZE.decode(request.body))
        model = self._generate.services.catalog.find(fields.model)
        check_token_ids(fields.tokens, model, "tokens")
        text = await _decode(model, fields.tokens)
        response.send(200, msgspec.json.encode({"prompt": text}), JSON, {"x-request-id": request_id_of(request)})


def _text(fields: TokenizeRequest, model: ServedModel) -> tuple[str, bool]:
    """Return the text to tokenise, and whether the tokenizer adds its own special tokens to it."""
    if (fields.prompt is None) == (fields.messages is None):
        raise InvalidRequestError("Give either prompt or messages.", param="prompt")
    if fields.prompt is not None:
        for name in _OF_CHATS:
            if getattr(fields, name) is not None:
                raise InvalidRequestError(f"{name} needs messages, not prompt. Remove it.", param=name)
        return fields.prompt, fields.add_special_tokens is not False
    chat = ChatRequest(
        model=fields.model,
        messages=fields.messages or [],
        tools=fields.tools,
        add_generation_prompt=fields.add_generation_prompt,
        continue_final_message=fields.continue_final_message,
        chat_template_kwargs=fields.chat_template_kwargs,
    )
    # A template writes special tokens itself, so by default none are added to what it gives.
    return render_chat(chat, model, chosen_tools(chat, model).tools, collector(model)), bool(fields.add_special_tokens)


async def _decode(model: ServedModel, tokens: list[int]) -> str:
    decode = model.text.tokenizer.tokenizer.decode
    if len(tokens) <= _INLINE_TOKENS:
        return decode(tokens, skip_special_tokens=False)
    return await asyncio.to_thread(decode, tokens, skip_special_tokens=False)
