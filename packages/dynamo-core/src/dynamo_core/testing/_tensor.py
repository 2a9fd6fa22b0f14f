"""An engine without tokens: images and tensors in, tensors out, under schemas of its own.

It is the proof that the contracts do not assume text: the same request plane, discovery, card and router carry it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

from dynamo_core.cards import EndpointTypes
from dynamo_core.content import ContentPart, tensor_part
from dynamo_core.engine import EngineConfig, EngineContext
from dynamo_core.enums import FinishReason, Modality, ModelInput, ModelType, PartKind
from dynamo_core.errors import ConfigurationError, InvalidRequestError, UnsupportedMediaError
from dynamo_core.planes import RequestContext
from dynamo_core.requests import GenerateChunk, GenerateRequest, Usage

TENSOR_TYPES = EndpointTypes(request="example.tensor_request.v1", response="example.tensor_chunk.v1")


class TensorEchoEngine:
    """Answers each part with a tensor: a tensor with itself, an image with its bytes as a ``u8`` vector."""

    def __init__(self) -> None:
        self._running: set[str] = set()
        self._aborted: set[str] = set()
        self._idle = asyncio.Event()
        self._idle.set()

    @classmethod
    def from_args(cls, args: Sequence[str]) -> TensorEchoEngine:
        """Build one; it takes no flags.

        Raises:
            ConfigurationError: for any flag.
        """
        if args:
            raise ConfigurationError(f"the tensor echo engine does not know {args[0]}; it takes no flags")
        return cls()

    async def start(self, context: EngineContext) -> EngineConfig:
        """Describe an engine without tokens, context or KV cache."""
        return EngineConfig(
            model="tensor-echo",
            model_types=(ModelType.TENSOR,),
            model_input=ModelInput.TENSOR,
            input_modalities=(Modality.TENSOR, Modality.IMAGE),
            output_modalities=(Modality.TENSOR,),
            types=TENSOR_TYPES,
        )

    async def generate(self, request: GenerateRequest, context: RequestContext) -> AsyncIterator[GenerateChunk]:
        """Yield one tensor a part, then the end.

        Raises:
            InvalidRequestError: without parts, or with prompt tokens.
            UnsupportedMediaError: for a part that is neither tensor nor inline image.
        """
        if request.token_ids or not request.parts:
            raise InvalidRequestError("this engine takes tensor and image parts and no tokens", param="parts")
        answers = [_answer(part, index) for index, part in enumerate(request.parts)]
        self._running.add(request.request_id)
        self._idle.clear()
        try:
            reason = FinishReason.STOP
            for answer in answers:
                await asyncio.sleep(0)
                if context.stopped or request.request_id in self._aborted:
                    reason = FinishReason.CANCELLED
                    break
                yield GenerateChunk(parts=(answer,), attempt=request.attempt)
            yield GenerateChunk(finish_reason=reason, usage=Usage(), attempt=request.attempt)
        finally:
            self._leave(request.request_id)

    async def abort(self, request_id: str) -> None:
        """End a request before its next part."""
        if request_id in self._running:
            self._aborted.add(request_id)

    async def drain(self) -> None:
        """Wait for what runs."""
        await self._idle.wait()

    async def cleanup(self) -> None:
        """End what runs before its next part. Idempotent."""
        self._aborted.update(self._running)

    def _leave(self, request_id: str) -> None:
        self._running.discard(request_id)
        self._aborted.discard(request_id)
        if not self._running:
            self._idle.set()


def _answer(part: ContentPart, index: int) -> ContentPart:
    if part.kind is PartKind.TENSOR:
        return tensor_part(part.data, shape=part.shape, dtype=part.dtype, name=part.name, index=index)
    if part.kind is PartKind.IMAGE and part.data:
        return tensor_part(part.data, shape=(len(part.data),), dtype="u8", name=part.name, index=index)
    raise UnsupportedMediaError(f"part {index} of kind {part.kind.value} is neither a tensor nor an inline image")
