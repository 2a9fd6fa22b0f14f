"""What vLLM gives, in our terms."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from dynamo_core.content import ContentPart, tensor_part
from dynamo_core.requests import GenerateChunk, GenerateRequest, PrefillResult, TokenLogprob, TopLogprob, Usage
from dynamo_worker._output_builder import Delta, OutputBuilder
from dynamo_worker._vllm._params import HANDOFF_KIND


def to_delta(part: Any, request: GenerateRequest, *, choice: int) -> Delta:
    """Return one ``CompletionOutput`` of a stream of deltas."""
    tokens = list(part.token_ids)
    logprobs = ()
    if request.output.logprobs is not None and part.logprobs:
        logprobs = tuple(
            _logprob(token, entry, request.output.logprobs) for token, entry in zip(tokens, part.logprobs, strict=True)
        )
    # Without text vLLM sees no stop strings: what stops is a token, be it one that only vLLM's configuration names.
    is_stop = part.finish_reason == "stop"
    return Delta(choice, tokens, logprobs, finish=part.finish_reason, is_end_token_last=is_stop)


def handed_over(last: GenerateChunk, parameters: Any, cached_tokens: int) -> GenerateChunk:
    """Return a prefill worker's answer: no token, and what the decode worker needs."""
    result = PrefillResult({"kind": HANDOFF_KIND, "kv_transfer_params": parameters}, cached_tokens=cached_tokens)
    return msgspec.structs.replace(last, handoff=result)


def embedding(data: Any, *, index: int) -> ContentPart:
    """Return the embedding of one input."""
    values = array("f", data.flatten().tolist())
    return tensor_part(values.tobytes(), shape=(len(values),), dtype="f32", name="embedding", index=index)


def embedding_chunk(parts: Sequence[ContentPart], prompt_tokens: int, output: OutputBuilder) -> GenerateChunk | None:
    """Return the one chunk that answers an embedding request."""
    output.take(Delta(finish="stop"))
    last = output.close()
    if last is None:
        return None
    return msgspec.structs.replace(last, first_index=0, parts=tuple(parts), usage=Usage(prompt_tokens=prompt_tokens))


def _logprob(token: int, entry: Mapping[int, Any], count: int) -> TokenLogprob:
    best = sorted(entry.items(), key=lambda item: -item[1].logprob)
    top = tuple(TopLogprob(other, value.logprob) for other, value in best[:count])
    return TokenLogprob(token, entry[token].logprob, top)
