"""Refusal, by name, of what the engine cannot serve: nothing is accepted and dropped."""

from __future__ import annotations

import math
from collections.abc import Sequence

from dynamo_core.enums import Modality, PartKind
from dynamo_core.errors import InvalidRequestError
from dynamo_core.requests import GenerateRequest, SamplingOptions
from dynamo_core.tokens import token_count, unpack_tokens
from dynamo_worker._reference._encoder import MAX_IMAGES
from dynamo_worker._reference._grammar import require_usable

MAX_CHOICES = 128
MAX_TOP_LOGPROBS = 64
MAX_EMBEDDING_INPUTS = 2048


def require_servable(
    request: GenerateRequest, *, vocab_size: int, max_context: int, eos: Sequence[int], images: bool = False
) -> None:
    """Check a request before it is queued.

    Args:
        request: The request.
        vocab_size: Token ids must be below it.
        max_context: Most tokens of prompt and output together.
        eos: Tokens that end an output of this model.
        images: Whether the engine takes images.

    Raises:
        InvalidRequestError: naming the field, its value and the remedy.
    """
    _require_features(request, images=images)
    _require_tokens(request, vocab_size)
    _require_room(request, max_context)
    _require_ranges(request.sampling)
    _require_vocabulary(request, vocab_size)
    if request.sampling.guided is not None:
        require_usable(request.sampling.guided)
        if request.sampling.allowed_token_ids:
            raise _refusal("allowed_token_ids", "and guided both limit the tokens; keep one")
    allowed = set(request.sampling.allowed_token_ids)
    ends = {*request.stop.stop_token_ids, *(() if request.stop.ignore_eos else request.eos_token_ids or eos)}
    if allowed and allowed <= ends and request.stop.min_tokens:
        raise _refusal("allowed_token_ids", "holds end tokens only, which min_tokens forbids; allow another token")


def embedding_inputs(request: GenerateRequest, *, vocab_size: int, max_context: int) -> list[Sequence[int]]:
    """Return the texts of an embedding request: its token parts in order, or the prompt if there are none.

    Raises:
        InvalidRequestError: naming the field, its value and the remedy.
    """
    others = [part.kind.value for part in request.parts if part.kind is not PartKind.TOKENS]
    if others:
        raise _refusal("parts", f"has a part of kind {others[0]!r}; embeddings take parts of kind 'tokens'")
    packed = [part.data for part in request.parts] or [request.token_ids]
    if len(packed) > MAX_EMBEDDING_INPUTS:
        raise _refusal("parts", f"has {len(packed)} inputs; give at most {MAX_EMBEDDING_INPUTS}")
    inputs = [unpack_tokens(data) for data in packed]
    for tokens in inputs:
        if not 0 < len(tokens) <= max_context:
            raise _refusal("token_ids", f"has an input of {len(tokens)} tokens; give 1 to {max_context}")
        if max(tokens) >= vocab_size:
            raise _refusal("token_ids", f"has the id {max(tokens)}; the model knows ids below {vocab_size}")
    return inputs


def _require_features(request: GenerateRequest, *, images: bool) -> None:
    unsupported = {
        "modality": request.modality is not Modality.TEXT or request.output.modality is not Modality.TEXT,
        "parts": bool(request.parts) and not images,
        "prompt_logprobs": request.output.prompt_logprobs is not None,
        "max_thinking_tokens": request.stop.max_thinking_tokens is not None,
        "handoff": request.handoff is not None,
        "extra": bool(request.extra),
    }
    for name, is_used in unsupported.items():
        if is_used:
            raise _refusal(name, "is not supported by the reference engine; leave it out or use another engine")
    if len(request.parts) > MAX_IMAGES:
        raise _refusal("parts", f"has {len(request.parts)} images; send at most {MAX_IMAGES}")


def _require_tokens(request: GenerateRequest, vocab_size: int) -> None:
    count = token_count(request.token_ids)
    if not count:
        raise _refusal("token_ids", "is empty; give at least one prompt token")
    highest = max(unpack_tokens(request.token_ids))
    if highest >= vocab_size:
        raise _refusal("token_ids", f"has the id {highest}; the model knows ids below {vocab_size}")
    if not 0 <= request.prompt_tokens <= count:
        raise _refusal("prompt_tokens", f"is {request.prompt_tokens}, but token_ids has {count} tokens")


def _require_room(request: GenerateRequest, max_context: int) -> None:
    count = token_count(request.token_ids)
    prompt = request.prompt_tokens or count
    wanted = request.stop.max_tokens
    if wanted is not None and wanted < 1:
        raise _refusal("max_tokens", f"is {wanted}; ask for at least 1")
    if prompt >= max_context or count > max_context:
        raise _refusal("token_ids", f"has {count} tokens, the context holds {max_context}; shorten the prompt")
    if wanted is not None and prompt + wanted > max_context:
        raise _refusal(
            "max_tokens",
            f"is {wanted}, but {prompt} prompt tokens leave {max_context - prompt} of a context of {max_context}; "
            "lower it or shorten the prompt",
        )
    if wanted is not None and request.stop.min_tokens > wanted:
        raise _refusal("min_tokens", f"is {request.stop.min_tokens}, above max_tokens {wanted}; lower it")


def _require_ranges(options: SamplingOptions) -> None:
    checks = {
        "temperature": (options.temperature, 0.0 <= options.temperature < math.inf, "0 or more"),
        "top_p": (options.top_p, 0.0 < options.top_p <= 1.0, "above 0, at most 1"),
        "top_k": (options.top_k, options.top_k >= -1, "-1 or more"),
        "min_p": (options.min_p, 0.0 <= options.min_p <= 1.0, "from 0 to 1"),
        "presence_penalty": (options.presence_penalty, -2.0 <= options.presence_penalty <= 2.0, "from -2 to 2"),
        "frequency_penalty": (options.frequency_penalty, -2.0 <= options.frequency_penalty <= 2.0, "from -2 to 2"),
        "repetition_penalty": (options.repetition_penalty, 0.0 < options.repetition_penalty < math.inf, "above 0"),
        "n": (options.n, 1 <= options.n <= MAX_CHOICES, f"from 1 to {MAX_CHOICES}"),
        "logit_bias": (options.logit_bias, all(map(math.isfinite, options.logit_bias.values())), "finite"),
    }
    for name, (value, is_good, wanted) in checks.items():
        if not is_good:
            raise _refusal(name, f"is {value}; it must be {wanted}")


def _require_vocabulary(request: GenerateRequest, vocab_size: int) -> None:
    named = {
        "logit_bias": request.sampling.logit_bias,
        "allowed_token_ids": request.sampling.allowed_token_ids,
        "stop_token_ids": request.stop.stop_token_ids,
        "eos_token_ids": request.eos_token_ids,
    }
    for name, tokens in named.items():
        outside = [token for token in tokens if not 0 <= token < vocab_size]
        if outside:
            raise _refusal(name, f"has the id {outside[0]}; the model knows ids from 0 to {vocab_size - 1}")
    top = request.output.logprobs
    if top is not None and not 0 <= top <= min(MAX_TOP_LOGPROBS, vocab_size):
        raise _refusal("logprobs", f"is {top}; ask for 0 to {min(MAX_TOP_LOGPROBS, vocab_size)} alternatives")
    if request.sampling.n > 1 and request.accepted_tokens:
        raise _refusal("n", f"is {request.sampling.n}, but a continuation has one choice; continue each alone")


def _refusal(name: str, problem: str) -> InvalidRequestError:
    return InvalidRequestError(f"{name} {problem}", param=name)
