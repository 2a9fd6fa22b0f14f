"""What a prefill worker hands to a decode worker, and what an engine must be able to do for it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import msgspec

from dynamo_core.engine import SupportsKvBlocks
from dynamo_core.enums import FinishReason
from dynamo_core.errors import BackendProtocolError, InvalidRequestError
from dynamo_core.kv import BlockDescriptor, BlockLayout
from dynamo_core.requests import GenerateChunk, GenerateRequest, PrefillResult
from dynamo_core.tokens import (
    TOKEN_BYTES,
    XXH3_1337_V1,
    BlockHasher,
    require_algorithm,
    token_count,
    unpack_hashes,
)
from dynamo_worker._media import media_of_blocks

HANDOFF_KIND = "dynamo.kv_handoff.v1"
TRANSFER_ENDPOINT = "worker_kv_transfer"
SHARED_MEMORY_HEADER = "x-dynamo-kv-shared-memory"


@runtime_checkable
class SupportsKvHandoff(SupportsKvBlocks, Protocol):
    """An engine whose blocks can be found, kept in place, and copied without a detour."""

    async def import_blocks(self, blocks: Sequence[BlockDescriptor], data: Sequence[bytes | memoryview]) -> int:
        """As in ``SupportsKvBlocks``, from any memory."""
        ...

    async def match_blocks(self, sequence_hashes: Sequence[int]) -> int:
        """Return how many of these blocks, from the start, the device holds."""
        ...

    async def hold_blocks(self, sequence_hashes: Sequence[int]) -> int:
        """Keep the longest prefix of these blocks that the device holds until released; return its length."""
        ...

    async def release_blocks(self, sequence_hashes: Sequence[int]) -> None:
        """Let go of blocks that ``hold_blocks`` kept: exactly those, once for each time they were held."""
        ...

    async def read_blocks_into(self, sequence_hashes: Sequence[int], buffer: memoryview) -> int:
        """Copy the longest prefix that the device holds to the start of ``buffer``; return how many blocks."""
        ...


class KvHandoff(msgspec.Struct, frozen=True, omit_defaults=True):
    """Pull parameters: where a prompt's blocks lie, and for how long. Travels in ``PrefillResult.parameters``.

    Attributes:
        address: URL of the transfer endpoint on the request plane.
        endpoint: The transfer endpoint, ``namespace.component.worker_kv_transfer``.
        instance_id: The prefill worker.
        lease_id: Names the hold on the blocks; ``TransferRequest.transfer_id`` of the pull.
        lease_s: Seconds, from when this was sent, that the blocks are kept.
        sequence_hashes: The blocks in order, packed.
        layout: Shape of a block.
        algorithm: Hash algorithm.
        shared_memory: Names a file by which the receiver finds out whether both share memory; empty if not offered.
        kind: Version of this record.
        nixl: Whether the blocks can be read through NIXL.
        bootstrap: Whether the prompt is still being computed: the lease's name is then the room where both meet.
    """

    address: str
    endpoint: str
    instance_id: int
    lease_id: str
    lease_s: float
    sequence_hashes: bytes
    layout: BlockLayout
    algorithm: str = XXH3_1337_V1
    shared_memory: str = ""
    kind: str = HANDOFF_KIND
    bootstrap: bool = False
    nixl: bool = False

    def to_result(self, *, cached_tokens: int) -> PrefillResult:
        """Return the record as it travels."""
        return PrefillResult(self.to_parameters(), cached_tokens=cached_tokens)

    def to_parameters(self) -> dict[str, Any]:
        """Return the record as a map, with its kind."""
        parameters: dict[str, Any] = msgspec.to_builtins(self, builtin_types=(bytes,))
        return {**parameters, "kind": self.kind}

    @classmethod
    def from_result(cls, result: PrefillResult) -> KvHandoff:
        """Read the record.

        Raises:
            BackendProtocolError: if it is of another kind: the two workers do not fit together.
        """
        kind = result.parameters.get("kind")
        if kind != HANDOFF_KIND:
            raise BackendProtocolError(
                f"the hand-off is {kind!r}, this worker takes {HANDOFF_KIND!r}; "
                "use prefill and decode workers of one engine"
            )
        try:
            found = msgspec.convert(result.parameters, cls)
        except (msgspec.ValidationError, InvalidRequestError) as error:
            raise BackendProtocolError(f"the hand-off cannot be read: {error}") from error
        require_algorithm(found.algorithm)
        return found


class TransferHead(msgspec.Struct, frozen=True, omit_defaults=True):
    """First item of a transfer.

    Attributes:
        blocks: Blocks that follow, from the start of those asked for.
        segment: Path of the shared memory they come through; empty if the items carry the bytes.
        slot_blocks: Blocks a slot of the segment holds.
        slots: Slots of the segment.
    """

    blocks: int
    segment: str = ""
    slot_blocks: int = 0
    slots: int = 0


HEAD_ENCODER = msgspec.msgpack.Encoder()
HEAD_DECODER = msgspec.msgpack.Decoder(TransferHead)


def prompt_blocks(request: GenerateRequest, block_size: int) -> list[BlockDescriptor]:
    """Return the blocks of a prompt that can come from elsewhere: all full ones without the newest token.

    The newest token is computed by whoever samples: its logits are what the step is for.
    """
    count = max(0, token_count(request.token_ids) - 1) // block_size
    hasher = BlockHasher(block_size, lora=request.routing.lora, salt=request.routing.cache_salt)
    media = media_of_blocks(request.parts, block_size, count)
    hashes = hasher.hash_tokens(request.token_ids[: count * block_size * TOKEN_BYTES], mm_hashes=media)
    local, chained = unpack_hashes(hashes.local), unpack_hashes(hashes.sequence)
    parents = [None, *chained[:-1]] if count else []
    return [BlockDescriptor(chained[index], local[index], parents[index], index) for index in range(count)]


def ends_of_choices(request: GenerateRequest, reason: FinishReason) -> Iterator[GenerateChunk]:
    """Yield an empty end for every choice but the first, for workers that give a request one answer."""
    for choice in range(1, request.sampling.n):
        yield GenerateChunk(
            first_index=request.accepted_tokens, choice=choice, attempt=request.attempt, finish_reason=reason
        )
