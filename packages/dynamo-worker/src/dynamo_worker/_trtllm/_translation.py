"""Requests in TensorRT-LLM's terms, and its answers in ours."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dynamo_core.errors import InvalidRequestError, UnavailableError
from dynamo_core.requests import GenerateRequest, GuidedDecoding, TokenLogprob, TopLogprob
from dynamo_worker._output_builder import Delta

_GREEDY_BELOW = 1e-5
_PENALTIES = {"presence_penalty": 0.0, "frequency_penalty": 0.0, "repetition_penalty": 1.0, "min_p": 0.0}
_SEED_LIMIT = 1 << 63
_UNSUPPORTED = ("logit_bias", "allowed_token_ids")


def is_greedy(request: GenerateRequest) -> bool:
    """Whether all choices are one and the same."""
    return request.sampling.temperature < _GREEDY_BELOW


def require_expressible(request: GenerateRequest) -> None:
    """Check that every option has a form in TensorRT-LLM.

    Raises:
        InvalidRequestError: naming the option.
    """
    for name in _UNSUPPORTED:
        if getattr(request.sampling, name):
            raise InvalidRequestError(f"TensorRT-LLM has no {name}; leave it out", param=name)
    if request.output.prompt_logprobs is not None:
        raise InvalidRequestError("prompt_logprobs are not served by this engine; leave them out", param="logprobs")
    if request.handoff is not None:
        raise InvalidRequestError("the TensorRT-LLM engine takes no hand-off; use aggregated workers", param="handoff")
    if request.sampling.temperature < 0:
        raise InvalidRequestError("temperature is negative; give 0 or more", param="temperature")


@dataclass(frozen=True)
class Stage:
    """A part of one choice's output. A choice has two of them where several end tokens must be held back.

    TensorRT-LLM's ``min_tokens`` holds back one end token alone. Where there are more, the first tokens come from a
    stage that forbids them all, and the rest goes on from there.

    Attributes:
        max_tokens: Most tokens of this part.
        end_token_ids: Tokens that end it.
        min_tokens: Tokens before which they may not come; for one end token.
        banned: Tokens that may not come at all.
        is_last: Whether the choice ends with it.
    """

    max_tokens: int
    end_token_ids: Sequence[int]
    min_tokens: int = 0
    banned: Sequence[int] = ()
    is_last: bool = True


def stages(request: GenerateRequest, end_token_ids: Sequence[int], *, max_tokens: int) -> list[Stage]:
    """Return the parts of one choice."""
    held_back = min(max(0, request.stop.min_tokens - request.accepted_tokens), max_tokens)
    if not held_back or len(end_token_ids) < 2 or request.sampling.guided is not None:  # a constraint is one whole
        return [Stage(max_tokens, end_token_ids, held_back)]
    is_all = held_back == max_tokens
    first = Stage(held_back, (), banned=end_token_ids, is_last=is_all)
    return [first] if is_all else [first, Stage(max_tokens - held_back, end_token_ids)]


def sampling_fields(request: GenerateRequest, stage: Stage, *, choice: int, position: int) -> dict[str, Any]:
    """Return the fields of ``SamplingParams``, the constraint aside.

    Log-probabilities of zero alternatives are asked for as one: TensorRT-LLM takes zero for none at all.

    Args:
        request: What was asked.
        stage: Which part of the output.
        choice: Index of the choice, which its seed depends on.
        position: Tokens of the choice so far.
    """
    # What ends the output beside the first end token is a stop word of one token, kept in the output so that it can be
    # told which one it was.
    first, *others = stage.end_token_ids or [-1]
    fields: dict[str, Any] = {
        "max_tokens": stage.max_tokens,
        "end_id": first,
        "pad_id": max(0, first),
        "ignore_eos": first < 0,
        "stop_token_ids": others or None,
        "include_stop_str_in_output": True,
        "detokenize": False,
        "skip_special_tokens": request.output.skip_special_tokens,
    }
    fields |= _draw(request, choice, position)
    fields |= {name: value for name, value in _penalties(request).items() if value != _PENALTIES[name]}
    if stage.min_tokens:
        fields["min_tokens"] = stage.min_tokens
    if stage.banned:
        fields["bad_token_ids"] = list(stage.banned)
    if request.output.logprobs is not None:
        fields["logprobs"] = max(1, request.output.logprobs)
    return fields


def constraint(guided: GuidedDecoding) -> dict[str, Any]:
    """Return the fields of ``GuidedDecodingParams``.

    Raises:
        InvalidRequestError: for a constraint that TensorRT-LLM has no form of.
    """
    if guided.json is not None:
        return {"json": guided.json}
    if guided.regex is not None:
        return {"regex": guided.regex}
    if guided.choice:
        return {"regex": "(" + "|".join(map(re.escape, guided.choice)) + ")"}
    if guided.grammar is not None:
        return {"grammar": guided.grammar}
    if guided.structural_tag is not None:
        tag = guided.structural_tag
        return {"structural_tag": tag if isinstance(tag, str) else json.dumps(tag)}
    raise InvalidRequestError("TensorRT-LLM has no whitespace_pattern; leave it out", param="guided")


class ChoiceReader:
    """Reads the streams of one choice's stages, whose outputs are all so far.

    Args:
        request: What was asked.
        choice: Index of the choice.
    """

    def __init__(self, request: GenerateRequest, choice: int) -> None:
        self.cached_tokens = 0
        self.tokens: list[int] = []
        self._request = request
        self._choice = choice
        self._seen = 0

    def begin(self) -> None:
        """Another stage's stream comes."""
        self._seen = 0

    def read(self, result: Any, stage: Stage) -> Delta:
        """Return what is new in a ``RequestOutput``.

        Raises:
            UnavailableError: if TensorRT-LLM gave the request up.
        """
        (output,) = result.outputs
        if not self.tokens:
            self.cached_tokens = int(getattr(result, "cached_tokens", 0) or 0)
        tokens = list(output.token_ids[self._seen :])
        entries = list((output.logprobs or [])[self._seen :])
        self._seen += len(tokens)
        self.tokens += tokens
        finish = output.finish_reason
        if finish in ("cancelled", "timeout"):
            raise UnavailableError("TensorRT-LLM gave the request up.", reason="backend.unknown", diagnostic=finish)
        is_end = finish == "stop" and bool(tokens) and tokens[-1] in stage.end_token_ids
        shown = finish if stage.is_last or is_end else None
        return Delta(self._choice, tokens, self._logprobs(tokens, entries), finish=shown, is_end_token_last=is_end)

    def _logprobs(self, tokens: Sequence[int], entries: Sequence[Mapping[int, Any]]) -> tuple[TokenLogprob, ...]:
        wanted = self._request.output.logprobs
        if wanted is None:
            return ()
        return tuple(_logprob(token, entry, wanted) for token, entry in zip(tokens, entries, strict=True))


def _draw(request: GenerateRequest, choice: int, position: int) -> dict[str, Any]:
    sampling = request.sampling
    if is_greedy(request):
        return {"top_k": 1}  # without top_p: the library's own sign of a greedy request
    fields: dict[str, Any] = {"temperature": sampling.temperature, "top_p": sampling.top_p}
    if sampling.top_k > 0:
        fields["top_k"] = sampling.top_k
    if sampling.seed is not None:
        fields["seed"] = (sampling.seed + choice + (position << 32)) % _SEED_LIMIT
    return fields


def _penalties(request: GenerateRequest) -> dict[str, float]:
    return {name: getattr(request.sampling, name) for name in _PENALTIES}


def _logprob(token: int, entry: Mapping[int, Any], count: int) -> TokenLogprob:
    best = sorted(entry.items(), key=lambda item: -item[1].logprob)
    return TokenLogprob(
        token, entry[token].logprob, tuple(TopLogprob(other, value.logprob) for other, value in best[:count])
    )
