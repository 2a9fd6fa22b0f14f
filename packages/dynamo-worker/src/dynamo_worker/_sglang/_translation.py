"""Requests in SGLang's terms, and its answers in ours."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from dynamo_core.errors import DynamoError, InvalidRequestError, UnavailableError
from dynamo_core.requests import GenerateRequest, GuidedDecoding, TokenLogprob, TopLogprob
from dynamo_worker._output_builder import Delta

_SAMPLING = ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty")
_GREEDY_BELOW = 1e-5
_BAD_REQUEST = 400


def is_greedy(request: GenerateRequest) -> bool:
    """Whether all choices are one and the same."""
    return request.sampling.temperature < _GREEDY_BELOW


def sampling_params(
    request: GenerateRequest, end_token_ids: Sequence[int], *, choice: int, max_tokens: int
) -> dict[str, Any]:
    """Return SGLang's sampling parameters of one choice.

    Raises:
        InvalidRequestError: for an option that SGLang has no form of.
    """
    sampling, stop = request.sampling, request.stop
    if sampling.allowed_token_ids:
        raise InvalidRequestError("SGLang has no allowed_token_ids; leave them out", param="allowed_token_ids")
    params: dict[str, Any] = {name: getattr(sampling, name) for name in _SAMPLING}
    params |= {
        "top_k": sampling.top_k if sampling.top_k > 0 else -1,
        "max_new_tokens": max_tokens,
        "min_new_tokens": max(0, stop.min_tokens - request.accepted_tokens),
        "stop_token_ids": list(end_token_ids),
        "ignore_eos": stop.ignore_eos,
        "skip_special_tokens": request.output.skip_special_tokens,
        **_constraint(sampling.guided),
    }
    if sampling.logit_bias:
        params["logit_bias"] = {str(token): value for token, value in sampling.logit_bias.items()}
    if sampling.seed is not None:
        params["sampling_seed"] = (sampling.seed + choice) % (1 << 31)
    return params


class ChoiceReader:
    """Reads the stream of one choice, whether its pieces are all so far or only what is new.

    Args:
        request: What was asked.
        choice: Index of the choice.
    """

    def __init__(self, request: GenerateRequest, choice: int) -> None:
        self.cached_tokens = 0
        self.is_finished = False
        self._request = request
        self._choice = choice
        self._seen = 0

    def read(self, chunk: Mapping[str, Any]) -> Delta:
        """Return what is new in a piece.

        Raises:
            InvalidRequestError: if SGLang refused the request.
            UnavailableError: if SGLang gave it up.
        """
        meta: Mapping[str, Any] = chunk["meta_info"]
        count = int(meta["completion_tokens"]) - self._seen
        self._seen += count
        self.cached_tokens = int(meta.get("cached_tokens") or 0)
        finish = meta.get("finish_reason") or {}
        self.is_finished = bool(finish)
        if finish.get("type") == "abort":
            raise _abortion(finish)
        tokens = list(chunk["output_ids"])[-count:] if count else []
        is_stop = finish.get("type") == "stop" and isinstance(finish.get("matched"), int)
        if is_stop and (not tokens or tokens[-1] != finish["matched"]):
            tokens.append(finish["matched"])  # SGLang leaves out the token that ended the output
        logprobs = self._logprobs(meta, count) + (TokenLogprob(0, 0.0),) * (len(tokens) - count)
        given = logprobs if self._request.output.logprobs is not None else ()
        return Delta(self._choice, tokens, given, finish=finish.get("type"), is_end_token_last=is_stop)

    def _logprobs(self, meta: Mapping[str, Any], count: int) -> tuple[TokenLogprob, ...]:
        wanted = self._request.output.logprobs
        if wanted is None or not count:
            return ()
        chosen = meta["output_token_logprobs"][-count:]
        tops = (meta.get("output_top_logprobs") or [])[-count:] if wanted else []
        return tuple(
            TokenLogprob(int(token), float(value), _tops(tops[index] if index < len(tops) else (), wanted))
            for index, (value, token, *_) in enumerate(chosen)
        )


def _tops(entries: Sequence[Sequence[Any]] | None, count: int) -> tuple[TopLogprob, ...]:
    return tuple(TopLogprob(int(token), float(value)) for value, token, *_ in (entries or ())[:count])


def _constraint(guided: GuidedDecoding | None) -> dict[str, str]:
    if guided is None:
        return {}
    if guided.json is not None:
        return {"json_schema": guided.json if isinstance(guided.json, str) else json.dumps(guided.json)}
    if guided.regex is not None:
        return {"regex": guided.regex}
    if guided.choice:
        return {"regex": "(" + "|".join(map(re.escape, guided.choice)) + ")"}
    if guided.grammar is not None:
        return {"ebnf": guided.grammar}
    if guided.structural_tag is not None:
        return {"structural_tag": json.dumps(guided.structural_tag)}
    raise InvalidRequestError("SGLang has no whitespace_pattern per request; leave it out", param="guided")


def _abortion(finish: Mapping[str, Any]) -> DynamoError:
    message = str(finish.get("message") or "no reason given")
    code = finish.get("status_code")
    if code is not None and int(code) == _BAD_REQUEST:
        return InvalidRequestError(f"SGLang refuses the request: {message}")
    return UnavailableError("SGLang gave the request up.", reason="backend.engine_shutdown", diagnostic=message)
