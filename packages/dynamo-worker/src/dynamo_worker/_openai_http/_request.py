"""A generation request as the body of ``/v1/completions``, and what cannot be said in one."""

from __future__ import annotations

from typing import Any

import msgspec

from dynamo_core.enums import Modality, PartKind
from dynamo_core.errors import InvalidRequestError
from dynamo_core.requests import GenerateRequest, SamplingOptions
from dynamo_core.tokens import token_count, unpack_tokens
from dynamo_worker._openai_http._server import OutputForm, ServerFacts

_NEUTRAL = SamplingOptions()
_GREEDY_BELOW = 1e-5
_PLAIN = ("temperature", "top_p", "presence_penalty", "frequency_penalty", "seed", "n")
_EXTENDED = ("top_k", "min_p", "repetition_penalty")


def require_sendable(request: GenerateRequest, facts: ServerFacts) -> None:
    """Check a request before it is sent.

    Raises:
        InvalidRequestError: naming the field and the remedy.
    """
    count = token_count(request.token_ids)
    if request.modality is not Modality.TEXT:
        raise InvalidRequestError(f"modality {request.modality.value} is not served by this engine", param="modality")
    if facts.takes_tokens and not count:
        raise InvalidRequestError("token_ids is empty; give at least one prompt token", param="token_ids")
    if not facts.takes_tokens and not prompt_text(request):
        raise InvalidRequestError("the server takes text; give the prompt as a text part", param="parts")
    if facts.context_length and count >= facts.context_length:
        raise InvalidRequestError(
            f"token_ids has {count} tokens, the context holds {facts.context_length}; shorten the prompt",
            param="token_ids",
        )
    if request.output.logprobs is not None and facts.output is OutputForm.TEXT:
        raise InvalidRequestError("logprobs need a server that returns token ids; leave them out", param="logprobs")
    if request.output.prompt_logprobs is not None:
        raise InvalidRequestError(
            "prompt_logprobs are not served by this engine; leave them out", param="prompt_logprobs"
        )
    if request.sampling.n > 1 and request.accepted_tokens:
        raise InvalidRequestError("a continuation has one choice; continue each alone", param="n")


def prompt_text(request: GenerateRequest) -> str:
    """Return the text parts joined."""
    return "".join(part.text for part in request.parts if part.kind is PartKind.TEXT)


def completion_body(request: GenerateRequest, facts: ServerFacts, end_token_ids: list[int]) -> bytes:
    """Return the JSON body.

    Options that OpenAI does not know are sent only if they change something: strict servers refuse unknown fields.
    """
    sampling, accepted = request.sampling, request.accepted_tokens
    body: dict[str, Any] = {
        "model": request.routing.lora or facts.remote_model,
        "prompt": list(unpack_tokens(request.token_ids)) if facts.takes_tokens else prompt_text(request),
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": sampling.temperature,
        "max_tokens": _max_tokens(request, facts),
    }
    for name in (*_PLAIN, *_EXTENDED):
        value = getattr(sampling, name)
        if value != getattr(_NEUTRAL, name):
            body[name] = value
    if copies(request) > 1:
        del body["n"]
    body |= _stop_fields(request, end_token_ids, accepted)
    body |= _output_fields(request, facts)
    body |= _rare_fields(request)
    return msgspec.json.encode({**body, **request.extra})


def copies(request: GenerateRequest) -> int:
    """Return how often one output answers the request: equal choices are computed once; some servers refuse them."""
    return request.sampling.n if request.sampling.temperature < _GREEDY_BELOW else 1


def _max_tokens(request: GenerateRequest, facts: ServerFacts) -> int | None:
    wanted = request.stop.max_tokens
    if wanted is not None:
        return wanted - request.accepted_tokens
    # Without a number servers stop after 16 tokens.
    return facts.context_length - token_count(request.token_ids) if facts.context_length else None


def _stop_fields(request: GenerateRequest, end_token_ids: list[int], accepted: int) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    if end_token_ids:
        fields["stop_token_ids"] = end_token_ids
    if request.stop.ignore_eos:
        fields["ignore_eos"] = True
    if request.stop.min_tokens > accepted:
        fields["min_tokens"] = request.stop.min_tokens - accepted
    return fields


def _output_fields(request: GenerateRequest, facts: ServerFacts) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    if facts.output is OutputForm.TOKEN_IDS:
        fields["return_token_ids"] = True
    if facts.output is not OutputForm.TEXT:
        fields["return_tokens_as_token_ids"] = True
    if request.output.logprobs is not None:
        fields["logprobs"] = request.output.logprobs
    elif facts.output is OutputForm.LOGPROBS:
        fields["logprobs"] = 0
    if not request.output.skip_special_tokens:
        fields["skip_special_tokens"] = False
    return fields


def _rare_fields(request: GenerateRequest) -> dict[str, Any]:
    sampling = request.sampling
    fields: dict[str, Any] = {}
    if sampling.logit_bias:
        fields["logit_bias"] = {str(token): bias for token, bias in sampling.logit_bias.items()}
    if sampling.allowed_token_ids:
        fields["allowed_token_ids"] = sampling.allowed_token_ids
    if sampling.guided is not None:
        fields["structured_outputs"] = msgspec.to_builtins(sampling.guided)
    if request.routing.cache_salt:
        fields["cache_salt"] = request.routing.cache_salt
    if request.routing.priority:
        fields["priority"] = request.routing.priority
    return fields
