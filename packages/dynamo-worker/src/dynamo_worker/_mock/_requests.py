"""What the mock takes, and how long its answers are."""

from __future__ import annotations

import xxhash

from dynamo_core.enums import FinishReason
from dynamo_core.errors import InvalidRequestError
from dynamo_core.requests import GenerateRequest
from dynamo_core.tokens import token_count
from dynamo_worker._mock._settings import MockSettings


def check_request(request: GenerateRequest, settings: MockSettings) -> None:
    """Refuse what the mock could never serve, and options that it would have to ignore.

    Raises:
        InvalidRequestError: naming field, value and remedy.
    """
    length = token_count(request.token_ids)
    if not length:
        raise InvalidRequestError("the prompt is empty; give at least one token", param="token_ids")
    if length >= settings.context_length and not _complete(request):
        raise InvalidRequestError(
            f"the prompt of {length} tokens leaves no room in the context of {settings.context_length}; shorten it",
            param="token_ids",
        )
    if request.sampling.n < 1:
        raise InvalidRequestError(f"n is {request.sampling.n}; ask for at least one choice", param="n")
    _check_blocks(request, settings)
    for param, given in _unsupported(request).items():
        if given:
            raise InvalidRequestError(f"the mock engine has no {param}; leave it out", param=param)


def output_limit(request: GenerateRequest, settings: MockSettings, choice: int) -> tuple[int, FinishReason]:
    """Return at how many output tokens a choice ends, and how: at its limit, or at an end of its own."""
    room = settings.context_length - (request.prompt_tokens or token_count(request.token_ids))
    stop = request.stop
    if stop.max_tokens is not None:
        return min(stop.max_tokens, room), FinishReason.LENGTH
    if stop.ignore_eos:
        return room, FinishReason.LENGTH
    prompt = bytes(request.token_ids[: 4 * request.prompt_tokens] if request.prompt_tokens else request.token_ids)
    natural = 1 + xxhash.xxh3_64_intdigest(prompt, choice + 1) % settings.default_output_tokens
    wanted = max(natural, stop.min_tokens)
    return (wanted, FinishReason.EOS) if wanted < room else (room, FinishReason.LENGTH)


def _complete(request: GenerateRequest) -> bool:
    return request.stop.max_tokens is not None and request.accepted_tokens >= request.stop.max_tokens


def _check_blocks(request: GenerateRequest, settings: MockSettings) -> None:
    limit, _ = output_limit(request, settings, 0)
    longest = (request.prompt_tokens or token_count(request.token_ids)) + limit
    need = -(-longest // settings.kv_block_size)
    if need > settings.total_kv_blocks:
        raise InvalidRequestError(
            f"prompt and output of {longest} tokens need {need} KV blocks of {settings.total_kv_blocks}; "
            "shorten the prompt or lower max_tokens",
            param="max_tokens",
        )


def _unsupported(request: GenerateRequest) -> dict[str, bool]:
    return {
        "logprobs": request.output.logprobs is not None,
        "prompt_logprobs": request.output.prompt_logprobs is not None,
        "guided": request.sampling.guided is not None,
        "logit_bias": bool(request.sampling.logit_bias),
        "allowed_token_ids": bool(request.sampling.allowed_token_ids),
        "parts": bool(request.parts),
        "handoff": request.handoff is not None,
    }
