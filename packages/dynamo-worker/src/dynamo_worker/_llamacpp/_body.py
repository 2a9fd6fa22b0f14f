"""Requests in llama.cpp's terms."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import xxhash

from dynamo_core.errors import InvalidRequestError
from dynamo_core.requests import GenerateRequest, GuidedDecoding

_GREEDY_BELOW = 1e-5
_SEED_LIMIT = (1 << 32) - 1  # this value itself means a random seed
_SAMPLERS = ["penalties", "temperature", "min_p", "top_k", "top_p"]


def is_greedy(request: GenerateRequest) -> bool:
    """Whether all choices are one and the same."""
    return request.sampling.temperature < _GREEDY_BELOW


def completion_body(
    request: GenerateRequest, prompt: Sequence[int], *, choice: int, max_tokens: int, banned: Sequence[int] = ()
) -> dict[str, Any]:
    """Return the body of a streamed completion.

    Args:
        request: What was asked.
        prompt: Tokens to go on from.
        choice: Index of the choice, which its seed depends on.
        max_tokens: Most new tokens.
        banned: Tokens that may not come.

    Raises:
        InvalidRequestError: for a constraint that llama.cpp has no form of.
    """
    sampling = request.sampling
    bias: list[list[Any]] = [[token, value] for token, value in sampling.logit_bias.items()]
    return {
        "prompt": list(prompt),
        "max_tokens": max_tokens,
        "stream": True,
        "return_progress": True,
        "cache_prompt": True,
        "logprobs": max(1, request.output.logprobs or 0),
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": max(0, sampling.top_k),
        "min_p": sampling.min_p,
        "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty,
        "repeat_penalty": sampling.repetition_penalty,
        "repeat_last_n": len(prompt) + max_tokens,
        "samplers": _SAMPLERS,
        "ignore_eos": request.stop.ignore_eos,
        "logit_bias": bias + [[token, False] for token in banned],
        **_seed(request, choice, len(prompt)),
        **_constraint(sampling.guided),
    }


def _seed(request: GenerateRequest, choice: int, position: int) -> dict[str, int]:
    seed = request.sampling.seed
    if seed is None or is_greedy(request):
        return {}
    return {"seed": xxhash.xxh3_64_intdigest(f"{seed}/{choice}/{position}".encode()) % _SEED_LIMIT}


def _constraint(guided: GuidedDecoding | None) -> dict[str, Any]:
    if guided is None:
        return {}
    if guided.json is not None:
        schema: Any = json.loads(guided.json) if isinstance(guided.json, str) else guided.json
        # Where white space may go on for ever, small models let it.
        compact = {"x-guidance": {"whitespace_flexible": False}, **schema} if isinstance(schema, dict) else schema
        return {"json_schema": compact}
    if guided.regex is not None:
        return {"grammar": f"%llguidance {{}}\nstart: /{_escaped(guided.regex)}/"}
    if guided.choice:
        return {"grammar": "root ::= " + " | ".join(json.dumps(item) for item in guided.choice)}
    if guided.grammar is not None:
        return {"grammar": guided.grammar}
    name = "structural_tag" if guided.structural_tag is not None else "whitespace_pattern"
    raise InvalidRequestError(
        f"llama.cpp has no {name}; constrain with json, regex, choice or grammar", param=f"guided.{name}"
    )


def _escaped(regex: str) -> str:
    # A slash would end the regex in the grammar; one that is escaped already stays.
    return "".join(
        f"\\{char}" if char == "/" and regex[index - 1 : index] != "\\" else char for index, char in enumerate(regex)
    )
