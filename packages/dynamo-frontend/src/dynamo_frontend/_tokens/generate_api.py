"""Generation that takes token ids and gives token ids, for callers with a tokenizer of their own."""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import msgspec

from dynamo_core.enums import ModelType
from dynamo_core.errors import InvalidRequestError
from dynamo_frontend._catalog import ServedModel
from dynamo_frontend._generate_api import GenerateApi, ReplyForm, logprob_format
from dynamo_frontend._http.request import HttpRequest
from dynamo_frontend._http.response import HttpResponse
from dynamo_frontend._openai.fields import BodyDecoder, CompletionRequest, SamplingFields, StreamOptions
from dynamo_frontend._openai.stream import ReplyHead, StreamUsage
from dynamo_frontend._plan import GeneratePlan, check_token_ids, plan_completion
from dynamo_frontend._reply import ReplyWriter
from dynamo_frontend._request_id import is_plain_id
from dynamo_frontend._tokens.writers import TokenReply, TokenStream, TokenWhole


class StructuredOutputs(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Constraint on the output; one field at most."""

    json: Any = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    whitespace_pattern: str | None = None


class SamplingParams(SamplingFields, frozen=True, kw_only=True):
    """How tokens are drawn and when a choice ends."""

    logprobs: int | None = None
    structured_outputs: StructuredOutputs | None = None


class TokenRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Body of ``/inference/v1/generate``."""

    model: str
    token_ids: list[int]
    sampling_params: SamplingParams = SamplingParams()
    request_id: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    cache_salt: str | None = None
    priority: int | None = None


_DECODER = BodyDecoder(TokenRequest)
_GUIDED = ("json", "regex", "choice", "grammar", "whitespace_pattern")


class TokenApi:
    """Answers in token ids through the same pipeline as text completions, so a reply survives a lost worker too.

    Args:
        generate: The pipeline.
    """

    def __init__(self, generate: GenerateApi) -> None:
        self._generate = generate

    async def generate(self, request: HttpRequest, response: HttpResponse) -> None:
        """``POST /inference/v1/generate``."""
        given = cast("TokenRequest", _DECODER.decode(request.body))
        fields = as_completion(given)
        model = self._generate.find(fields, ModelType.COMPLETIONS)
        form = ReplyForm("generate", "", _writer, TokenReply)
        await self._generate.serve(fields, model, _plan, _named(request, given), response, form)


def as_completion(given: TokenRequest) -> CompletionRequest:
    """Return the same request as a text completion over token ids.

    Raises:
        InvalidRequestError: for token ids that are none, or a constraint that is none.
    """
    if not given.token_ids:
        raise InvalidRequestError("token_ids is empty; send at least one token.", param="token_ids")
    sampling = given.sampling_params
    values = {name: getattr(sampling, name) for name in sampling.__struct_fields__}
    structured = cast("StructuredOutputs | None", values.pop("structured_outputs"))
    if structured is not None:
        values.update({f"guided_{name}": getattr(structured, name) for name in _GUIDED})
    return CompletionRequest(
        model=given.model,
        prompt=given.token_ids,
        stream=given.stream,
        stream_options=given.stream_options,
        cache_salt=given.cache_salt,
        priority=given.priority,
        **values,
    )


async def _plan(fields: CompletionRequest, model: ServedModel) -> GeneratePlan:
    check_token_ids(cast("list[int]", fields.prompt), model, "token_ids")
    plan = await plan_completion(fields, model)
    plan.prompt_param = "token_ids"
    return plan


def _named(request: HttpRequest, given: TokenRequest) -> HttpRequest:
    """Return the request under the id that its body asks for; a header wins."""
    if given.request_id is None or request.header("x-request-id"):
        return request
    if not is_plain_id(given.request_id):
        raise InvalidRequestError("request_id must be 1 to 128 letters, digits or any of '._:-'.", param="request_id")
    return dataclasses.replace(request, headers={**request.headers, "x-request-id": given.request_id})


def _writer(response: HttpResponse, plan: GeneratePlan, head: ReplyHead, usage: StreamUsage) -> ReplyWriter:
    logprobs = logprob_format(plan)
    if plan.fields.stream:
        return TokenStream(response, head, usage, logprobs)
    return TokenWhole(response, head, plan.choices_per_prompt, logprobs)
