"""Requests in vLLM's terms: sampling and pooling parameters, constraints, hand-offs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, cast

from dynamo_core.errors import BackendProtocolError, InvalidRequestError
from dynamo_core.requests import GenerateRequest, GuidedDecoding, PrefillResult
from dynamo_core.tokens import token_count

HANDOFF_KIND = "vllm.kv_transfer_params.v1"
_GREEDY_BELOW = 1e-5
_REMOTE_DECODE = {"do_remote_decode": True, "do_remote_prefill": False}
_SAMPLING = ("top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "seed")
_CONSTRAINTS = ("json", "regex", "choice", "grammar", "structural_tag", "whitespace_pattern")


class ParamsBuilder:
    """Makes vLLM's parameter objects.

    Args:
        vllm: The module ``vllm``.
        context_length: Most tokens of prompt and output together.
        is_prefill: Whether this engine computes prompts for others.
    """

    def __init__(self, vllm: Any, *, context_length: int, is_prefill: bool) -> None:
        self._vllm = vllm
        self._context_length = context_length
        self._is_prefill = is_prefill

    def sampling(self, request: GenerateRequest, end_token_ids: list[int]) -> Any:
        """Return ``SamplingParams``.

        Raises:
            InvalidRequestError: for options that vLLM refuses.
            BackendProtocolError: for a hand-off of another engine.
        """
        sampling, wanted = request.sampling, request.output
        fields: dict[str, Any] = {name: getattr(sampling, name) for name in _SAMPLING}
        fields |= {
            "n": sampling.n // copies(request),
            "temperature": sampling.temperature,
            "top_k": max(0, sampling.top_k),
            "stop_token_ids": end_token_ids,
            "ignore_eos": request.stop.ignore_eos,
            "max_tokens": self._max_tokens(request),
            "min_tokens": max(0, request.stop.min_tokens - request.accepted_tokens),
            "logprobs": wanted.logprobs,
            "skip_special_tokens": wanted.skip_special_tokens,
            "detokenize": False,
            "output_kind": self._vllm.sampling_params.RequestOutputKind.DELTA,
            "logit_bias": dict(sampling.logit_bias) or None,
            "allowed_token_ids": list(sampling.allowed_token_ids) or None,
            **self._constraint(sampling.guided),
        }
        if transfer := self._transfer_params(request.handoff):
            fields["extra_args"] = {"kv_transfer_params": transfer}
        try:
            return self._vllm.SamplingParams(**fields)
        except Exception as error:
            raise_if_refused(error, param="sampling")
            raise

    def pooling(self) -> Any:
        """Return ``PoolingParams`` of an embedding."""
        return self._vllm.PoolingParams(task="embed")

    def _max_tokens(self, request: GenerateRequest) -> int:
        if self._is_prefill:
            return 1
        if request.stop.max_tokens is not None:
            return request.stop.max_tokens - request.accepted_tokens
        return self._context_length - token_count(request.token_ids)

    def _constraint(self, guided: GuidedDecoding | None) -> dict[str, Any]:
        if guided is None:
            return {}
        given = {name: getattr(guided, name) for name in _CONSTRAINTS if getattr(guided, name) not in (None, ())}
        if "choice" in given:
            given["choice"] = list(given["choice"])
        if isinstance(given.get("structural_tag"), Mapping):
            given["structural_tag"] = json.dumps(given["structural_tag"])
        module = self._vllm.sampling_params
        if hasattr(module, "StructuredOutputsParams"):
            return {"structured_outputs": module.StructuredOutputsParams(**given)}
        return {"guided_decoding": module.GuidedDecodingParams(**given)}

    def _transfer_params(self, handoff: PrefillResult | None) -> dict[str, Any] | None:
        if self._is_prefill:
            return dict(_REMOTE_DECODE)
        if handoff is None:
            return None
        if handoff.parameters.get("kind") != HANDOFF_KIND:
            raise BackendProtocolError(
                f"the hand-off is {handoff.parameters.get('kind')!r}, vLLM takes {HANDOFF_KIND!r}; "
                "use prefill and decode workers of one engine"
            )
        return cast("dict[str, Any]", handoff.parameters["kv_transfer_params"])


def copies(request: GenerateRequest) -> int:
    """Return how often one output answers the request: vLLM computes equal choices once, and refuses to do it more."""
    return request.sampling.n if request.sampling.temperature < _GREEDY_BELOW else 1


def raise_if_refused(error: Exception, *, param: str | None = None) -> None:
    """Raise what vLLM says of a request it cannot serve as the caller's error.

    Releases before 0.31 raise ``ValueError``; later ones have a class of their own for it.

    Raises:
        InvalidRequestError: if vLLM blames the request.
    """
    names = {kind.__name__ for kind in type(error).__mro__}
    if isinstance(error, TypeError | ValueError) or "VLLMClientError" in names:
        raise InvalidRequestError(f"vLLM refuses the request: {error}", param=param) from error
