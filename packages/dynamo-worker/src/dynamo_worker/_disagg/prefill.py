"""The prefill role: computes a prompt, keeps its blocks, and answers with pull parameters instead of tokens."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import msgspec

from dynamo_core.engine import Engine, EngineConfig, EngineContext
from dynamo_core.enums import FinishReason
from dynamo_core.ids import EndpointId
from dynamo_core.planes import RequestContext
from dynamo_core.requests import GenerateChunk, GenerateRequest, OutputOptions, SamplingOptions, StopConditions, Usage
from dynamo_worker._disagg.handoff import KvHandoff, SupportsKvHandoff, ends_of_choices, prompt_blocks
from dynamo_worker._disagg.leases import LeaseTable
from dynamo_worker._disagg.rooms import Room, Rooms, bootstrap_room

_GREEDY = SamplingOptions(temperature=0.0)
_ENDED = (FinishReason.LENGTH, FinishReason.EOS, FinishReason.STOP)


class PrefillEngine:
    """An engine that stops after the prompt, around one that goes on. The inner engine's life is its host's.

    Args:
        engine: Computes.
        blocks: The same engine's blocks.
        leases: Keeps them.
        rooms: Where receivers wait that come before the prompt is computed.
        endpoint: The transfer endpoint.
        address: Where it is served.
        instance_id: This worker.
        shared_memory: Marker of the memory that transfers may go through; empty without.
        nixl: Whether receivers may read through NIXL.

    Attributes:
        place: Where blocks are had, without a lease on any: what a card says to those who meet here.
    """

    def __init__(  # noqa: PLR0913 - built once, every argument by name
        self,
        engine: Engine,
        blocks: SupportsKvHandoff,
        leases: LeaseTable,
        rooms: Rooms,
        *,
        endpoint: EndpointId,
        address: str,
        instance_id: int,
        shared_memory: str,
        nixl: bool = False,
    ) -> None:
        self._engine = engine
        self._blocks = blocks
        self._leases = leases
        self._rooms = rooms
        self._layout = blocks.block_access().layout
        self.place = KvHandoff(
            address,
            str(endpoint),
            instance_id,
            "",
            leases.lease_s,
            b"",
            self._layout,
            shared_memory=shared_memory,
            nixl=nixl,
        )

    async def start(self, context: EngineContext) -> EngineConfig:
        """Start the inner engine."""
        return await self._engine.start(context)

    async def generate(self, request: GenerateRequest, context: RequestContext) -> AsyncIterator[GenerateChunk]:
        """Compute the prompt and yield one chunk, with the hand-off. A canary gets what the engine gives.

        A request that names a room has its blocks sent to whoever waits there, while the rest is computed. The sampled
        token is dropped: the decode worker samples it again, from the same logits, with the request's own options.
        Leaving the iterator aborts the request; blocks that are held already expire with their lease.

        Raises:
            DynamoError: what the engine raises.
        """
        name = bootstrap_room(request)
        if name is None:
            async for chunk in self._compute(request, context, None, ""):
                yield chunk
            return
        room = self._rooms.enter(name)
        try:
            async for chunk in self._compute(request, context, room, name):
                yield chunk
        finally:
            room.is_over = True
            self._rooms.leave(name, room)

    async def _compute(
        self, request: GenerateRequest, context: RequestContext, room: Room | None, lease_id: str
    ) -> AsyncIterator[GenerateChunk]:
        last: GenerateChunk | None = None
        chunks: Any = self._engine.generate(_prompt_only(request), context)
        try:
            async for chunk in chunks:
                if request.health_check:
                    yield chunk
                last = chunk
        finally:
            if hasattr(chunks, "aclose"):
                await chunks.aclose()
        if request.health_check or last is None:
            return
        if last.finish_reason not in _ENDED:
            yield msgspec.structs.replace(last, token_ids=b"", first_index=request.accepted_tokens)
            return
        for chunk in ends_of_choices(request, FinishReason.LENGTH):
            yield chunk
        yield await self._handed_over(request, last.usage or Usage(), room, lease_id)

    async def abort(self, request_id: str) -> None:
        """Abort in the inner engine."""
        await self._engine.abort(request_id)

    async def drain(self) -> None:
        """Drain the inner engine."""
        await self._engine.drain()

    async def cleanup(self) -> None:
        """Clean the inner engine up."""
        await self._engine.cleanup()

    async def _handed_over(
        self, request: GenerateRequest, usage: Usage, room: Room | None, lease_id: str
    ) -> GenerateChunk:
        hashes = [block.sequence_hash for block in prompt_blocks(request, self._layout.block_size)]
        held = 0
        if room is None or not room.is_served:
            lease_id, held = await self._leases.grant(hashes, lease_id)
        if room is not None and room.is_served:  # perhaps while the blocks were taken hold of
            await self._leases.release(lease_id)
        packed = b"".join(value.to_bytes(8, "little") for value in hashes[:held])
        handoff = msgspec.structs.replace(self.place, lease_id=lease_id, sequence_hashes=packed)
        return GenerateChunk(
            first_index=request.accepted_tokens,
            attempt=request.attempt,
            finish_reason=FinishReason.LENGTH,
            usage=Usage(usage.prompt_tokens, request.accepted_tokens, usage.cached_tokens),
            handoff=handoff.to_result(cached_tokens=usage.cached_tokens),
        )


def _prompt_only(request: GenerateRequest) -> GenerateRequest:
    if request.health_check:
        return request
    return msgspec.structs.replace(
        request,
        sampling=_GREEDY,
        stop=StopConditions(max_tokens=request.accepted_tokens + 1, ignore_eos=True),
        output=OutputOptions(),
        handoff=None,
    )
