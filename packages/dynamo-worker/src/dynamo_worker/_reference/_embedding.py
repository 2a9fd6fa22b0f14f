"""Embedding requests: one forward pass an input, between the engine's steps."""

from __future__ import annotations

from collections.abc import AsyncIterator

import msgspec

from dynamo_core.content import tensor_part
from dynamo_core.requests import GenerateChunk, GenerateRequest, Usage
from dynamo_worker._output_builder import Delta, OutputBuilder
from dynamo_worker._reference._running import Running
from dynamo_worker._reference._validation import embedding_inputs

FLOAT_BYTES = 4


async def embed(running: Running, request: GenerateRequest, output: OutputBuilder) -> AsyncIterator[GenerateChunk]:
    """Yield one chunk with a tensor part for each input. Requests that generate go on between the inputs.

    Raises:
        InvalidRequestError: for inputs that the model cannot take.
        NotFoundError: for an adapter that is not loaded.
    """
    running.require_open()
    inputs = embedding_inputs(request, vocab_size=running.config.vocab_size, max_context=running.max_context)
    adapter = running.loras.acquire(running.loras.resolve(request))
    try:
        found = [
            await running.thread.call(lambda tokens=tokens: running.core.embed(tokens, adapter)) for tokens in inputs
        ]
    finally:
        running.loras.release(adapter)
    parts = tuple(
        tensor_part(data, shape=(len(data) // FLOAT_BYTES,), dtype="f32", name="embedding", index=index)
        for index, data in enumerate(found)
    )
    output.take(Delta(finish="stop"))
    last = output.close()
    if last is not None:
        usage = Usage(prompt_tokens=sum(map(len, inputs)))
        yield msgspec.structs.replace(last, first_index=0, parts=parts, usage=usage)
